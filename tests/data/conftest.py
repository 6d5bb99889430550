"""Fixtures of the data tests. Nothing is left in the user's data set cache."""

from pathlib import Path

import datasets
import pytest

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "preference_sample.parquet"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def no_bars() -> None:
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def sample() -> Path:
    """Seven real pairs in Pick-a-Pic's columns: six from four images of one caption, and a tie."""
    if not SAMPLE.is_file():
        pytest.skip(f"the real pairs are not here: {SAMPLE}")
    return SAMPLE
