"""What a sweep's folder is known by, and how the folders of its runs are named."""

from collections.abc import Mapping

CONFIG, SWEEP = "config.yaml", "sweep.json"  # in the folder of a run, and in that of a sweep


def run_name(values: Mapping[str, str]) -> str:
    """The name of a run's folder in that of its sweep: flag -> value, as they were given."""
    return "-".join(f"{name}={value}" for name, value in values.items())
