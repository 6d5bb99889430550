"""The weights that a checkpoint of a run holds, put on the run's base at any strength.

At strength a the model computes with base + a (trained - base): 0 is the base, 1 what was trained, more goes on in the
same direction. Of a LoRA that is a B A.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dpo_fast.checksums import file_digest, parse_signed
from dpo_fast.errors import BadInput
from dpo_fast.files import read_bytes, regular_file
from dpo_fast.models.family import Family
from dpo_fast.models.load_errors import bad_input
from dpo_fast.models.lora import add_lora

STATE = "state.json"
WEIGHTS = ("ema.safetensors", "weights.safetensors")  # the first is there with --use_ema
_OTHER = "name another checkpoint, or put it back from a copy"
_SETTINGS = ("tuning", "rank", "lora_alpha", "lora_targets", "use_ema")


@dataclass(frozen=True)
class Trained:
    """What a checkpoint says and holds."""

    step: int
    settings: dict[str, object]  # those of the run's configuration that the weights depend on
    weights: dict[str, Tensor]  # parameter of the UNet -> fp32; the exponential moving average where the run keeps one

    @property
    def is_lora(self) -> bool:
        return self.settings["tuning"] == "lora"

    @property
    def adapters(self) -> dict[str, object] | None:
        """The keywords of `add_lora` for the adapters that the weights are of; None: there are none."""
        if not self.is_lora:
            return None
        of, rank = self.settings, self.settings["rank"]
        return {"rank": rank, "alpha": of["lora_alpha"] or rank, "targets": of["lora_targets"]}


def files_of(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint that hold its state and weights, as far as they exist."""
    return [file for name in (STATE, *WEIGHTS) if (file := checkpoint / name).is_file()]


def weights_file(checkpoint: Path) -> Path:
    """The file with the weights of a checkpoint: those of the exponential moving average, if the run keeps one."""
    return next((file for name in WEIGHTS if (file := checkpoint / name).is_file()), checkpoint / WEIGHTS[-1])


def read_trained(checkpoint: Path) -> Trained:
    """Read a checkpoint's weights, verified by its checksums. Raises BadInput for one that is damaged."""
    step, settings, file = check_trained(checkpoint)
    with bad_input(f"{checkpoint} cannot be used", _OTHER):
        return Trained(step, settings, load_file(file))


def check_trained(checkpoint: Path) -> tuple[int, dict[str, object], Path]:
    """Return a checkpoint's step, settings and file of weights, verified but not loaded. Raises BadInput likewise."""
    with bad_input(f"{checkpoint} cannot be used", _OTHER):
        state = parse_signed(read_bytes(checkpoint / STATE))
        settings = {name: state["config"][name] for name in _SETTINGS}
        name = WEIGHTS[0] if settings["use_ema"] else WEIGHTS[1]
        file = regular_file(checkpoint / name)
        if file_digest(file) != state["files"][name.removesuffix(".safetensors")]:
            raise ValueError(f"{name} is damaged: its checksum is not the one in {STATE}")
        return int(state["step"]), settings, file


class Blend:
    """A model whose weights lie between its base and a checkpoint, or beyond it."""

    def __init__(self, family: Family, trained: Trained) -> None:
        """family: the base of the run, which is changed in place. Raises BadInput if the weights are not of this UNet.

        Keeps a copy of the base's trained weights in host memory, unless they are a LoRA.
        """
        self.family, self.adapters = family, trained.adapters
        if self.adapters is not None:
            add_lora(family.unet, **self.adapters)
            family.unet.to(family.dtype)
        parameters = dict(family.unet.named_parameters())
        self.parameters = {name: parameters[name] for name in trained.weights if name in parameters}
        self.check(trained)
        self.base: Mapping[str, Tensor] = {}
        if not trained.is_lora:
            self.base = {name: value.detach().to("cpu", copy=True) for name, value in self.parameters.items()}
        family.unet.requires_grad_(False)

    def check(self, trained: Trained) -> None:
        """Raise BadInput unless a checkpoint's weights are those of this UNet that were trained."""
        of = {name: tuple(value.shape) for name, value in self.parameters.items()}
        if other := sorted(of.items() ^ {name: tuple(value.shape) for name, value in trained.weights.items()}.items()):
            raise BadInput(
                f"the checkpoint of step {trained.step} is of another UNet ({other[0][0]}, {len(other)} differ):"
                " name a run whose base is still there"
            )

    @torch.no_grad()
    def set(self, trained: Trained, strength: float) -> None:
        """Give the model a checkpoint's weights at a strength, each rounded once to the dtype it computes in."""
        for name, value in self.weights(trained, strength).items():
            self.parameters[name].copy_(value)

    def weights(self, trained: Trained, strength: float) -> dict[str, Tensor]:
        """Return those weights, fp32: at strengths 0 and 1 exactly the base's and the checkpoint's."""
        self.check(trained)
        if trained.is_lora:
            return {name: value * strength if ".lora_B." in name else value for name, value in trained.weights.items()}
        return {name: torch.lerp(self.base[name].float(), value, strength) for name, value in trained.weights.items()}
