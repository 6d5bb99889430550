"""The one exception that means "the user can mend this"; doors turn it into one line and exit status 2."""


class BadInput(ValueError):
    """Input that cannot be used. The message carries the value and the remedy."""


def missing_extra(package: str, extra: str, needed_for: str) -> BadInput:
    """The error for an optional package that is not installed, naming the extra that brings it."""
    return BadInput(
        f"{needed_for} needs the package {package!r}, which is not installed: pip install 'dpo_fast[{extra}]'"
    )
