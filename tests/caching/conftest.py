"""Nothing is left in the user's data set cache."""

from tests.data.conftest import no_bars, own_cache  # noqa: F401
