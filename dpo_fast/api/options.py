"""From the arguments of a function to the checked options of a command."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from dpo_fast.command_line import flags_of
from dpo_fast.errors import BadInput
from dpo_fast.files import NO_HOME, has_home

C = TypeVar("C")


def settled_options(
    kind: type[C], parse: Callable[[list[str]], C], config: C | None, settings: Mapping[str, object]
) -> C:
    """Return the options that `config`, an instance of `kind`, or `settings`, its fields by name, describe.

    They are checked as on the command line, by its `parse`. Raises BadInput.
    """
    if not has_home():
        raise BadInput(NO_HOME)  # libraries would create a folder named ~
    if config is not None:
        check_alone(config, kind, settings)
        settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(kind)}
    return parse(flags_of(settings, kind))


def check_alone(config: object, kind: type, settings: Collection[str]) -> None:
    """Raise BadInput if `config` is no `kind`, or if there are settings beside it."""
    if not isinstance(config, kind):
        raise BadInput(f"{config!r:.80} is no {kind.__name__}: give one, or settings by name")
    if settings:
        raise BadInput(
            f"{', '.join(settings)}: give a {kind.__name__} or settings, not both; dataclasses.replace(config, ...)"
            f" changes a {kind.__name__}"
        )
