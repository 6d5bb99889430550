"""dpo_fast: align text-to-image diffusion models with human preferences by Diffusion-DPO (arXiv 2311.12908).

    from dpo_fast import evaluate, train

    result = train(preset="shapes", max_train_steps=10)
    print(evaluate(policy=result.folder, prompts=["shapes"], scorers=["faithfulness"]))

Importing dpo_fast loads nothing heavy: a public name is imported when it is first used. docs/python.md describes them.
"""

__version__ = "0.1.0"

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from dpo_fast import quiet as quiet  # first of all: before any library that it quietens is imported

if TYPE_CHECKING:  # for editors and type checkers; at run time `__getattr__` imports what _PUBLIC says
    from dpo_fast.api.comparing import RunComparison, compare
    from dpo_fast.api.evaluation import Evaluation, evaluate
    from dpo_fast.api.generation import Images, generate
    from dpo_fast.api.pairs import LoadedPairs, Pair, load_pairs
    from dpo_fast.api.picking import Picking, pick
    from dpo_fast.api.scoring import score_images
    from dpo_fast.api.training import TrainResult, opened_run, train
    from dpo_fast.comparing.options import CompareConfig
    from dpo_fast.config import TrainConfig
    from dpo_fast.errors import BadInput
    from dpo_fast.evaluation.evaluate_options import EvaluateConfig
    from dpo_fast.evaluation.generate_options import GenerateConfig
    from dpo_fast.evaluation.pick_options import PickConfig
    from dpo_fast.objectives import Objective
    from dpo_fast.scorers import load_scorer
    from dpo_fast.training.callbacks import Callback
    from dpo_fast.training.trainer import Interrupted, Trainer

__all__ = [
    "BadInput",
    "Callback",
    "CompareConfig",
    "EvaluateConfig",
    "Evaluation",
    "GenerateConfig",
    "Images",
    "Interrupted",
    "LoadedPairs",
    "Objective",
    "Pair",
    "PickConfig",
    "Picking",
    "RunComparison",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "__version__",
    "compare",
    "evaluate",
    "generate",
    "load_pairs",
    "load_scorer",
    "opened_run",
    "pick",
    "score_images",
    "train",
]

_PUBLIC = {  # name -> the module that it is imported from
    "BadInput": "errors",
    "Callback": "training.callbacks",
    "CompareConfig": "comparing.options",
    "EvaluateConfig": "evaluation.evaluate_options",
    "Evaluation": "api.evaluation",
    "GenerateConfig": "evaluation.generate_options",
    "Images": "api.generation",
    "Interrupted": "training.trainer",
    "LoadedPairs": "api.pairs",
    "Objective": "objectives",
    "Pair": "api.pairs",
    "PickConfig": "evaluation.pick_options",
    "Picking": "api.picking",
    "RunComparison": "api.comparing",
    "TrainConfig": "config",
    "TrainResult": "api.training",
    "Trainer": "training.trainer",
    "compare": "api.comparing",
    "evaluate": "api.evaluation",
    "generate": "api.generation",
    "load_pairs": "api.pairs",
    "load_scorer": "scorers",
    "opened_run": "api.training",
    "pick": "api.picking",
    "score_images": "api.scoring",
    "train": "api.training",
}


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


class _Package(ModuleType):
    """This package. The commands are modules of it, some with the name of a public function.

    Python sets a package's attribute to each of its modules that is imported. Here a public name stays what it is, so
    that `dpo_fast.train` is the function whatever was imported before; the module is `sys.modules["dpo_fast.train"]`,
    and `from dpo_fast.train import main` and `python -m dpo_fast.train` work as for any module.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
