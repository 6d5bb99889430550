"""setup.py as a module."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load_setup() -> ModuleType:
    """setup.py as a module of its own, for its flags and functions."""
    spec = importlib.util.spec_from_file_location("dpo_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
