"""What our training step costs, counted without computing it: FLOPs, bytes, launches, saved activations.

    python -m benchmarks.step.counts [--write] [CASE ...]

The real `Trainer.train_step` runs on fake tensors, which have sizes and no values, so SDXL needs no memory. One
optimizer step over one pair, bf16, eager; the second one, since in the first the optimizer makes its state:

flops      of convolutions, matrix products and attention, 2 a multiply-add (an attention backward counts 2.5 forwards)
bytes      read and written by every operator, as if nothing stayed in a cache
launches   operators dispatched; views launch nothing
saved      bytes of activations that the policy's forward keeps for its backward, weights left out

`--write` puts them into benchmarks/results/counts.json, which tests/benchmarks/test_counts.py holds.
"""

import argparse
import importlib.metadata
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.step.cases import CASES, RANK, TOKENS, Case, scheduler_config
from dpo_fast.command_line import parse
from dpo_fast.data.batch import Batch
from dpo_fast.models.sd15 import SD15
from dpo_fast.models.sdxl import SDXL, Turbo
from dpo_fast.parallel import Ranks
from dpo_fast.training.run import Run, make_trainable
from dpo_fast.training.trainer import Trainer

FILE = Path(__file__).parents[1] / "results" / "counts.json"
aten = torch.ops.aten


@dataclass
class StepCounts:
    """The counts of one optimizer step over one pair."""

    flops: int
    ref_flops: int  # of them: the reference's forward
    forward_flops: int  # of them: the policy's forward
    bytes: int
    launches: int
    ref_launches: int  # of them: in the reference's forward
    forward_launches: int  # of them: in the policy's forward
    optimizer_launches: int  # of them: in the optimizer's step
    saved: int


@dataclass
class EncoderCounts:
    """FLOPs of the encoders, which run once with a cache and at every visit without one."""

    vae: int  # per image
    text: int  # per prompt, all encoders


def _attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# PyTorch itself has formulas only for the GPU's attention kernels.
_CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def flop_counter() -> FlopCounterMode:
    """Return a FLOP counter that knows the CPU's attention too."""
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)


class Operators(TorchDispatchMode):
    """Count the operators that do work, and the bytes they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        inputs = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        read = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in read]
        if (new or function._schema.is_mutable) and function not in _NO_LAUNCH:
            self.launches += 1
            written = new if new else inputs[:1]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in [*inputs, *written])
        return result


_NO_LAUNCH = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty_strided.default,
    aten.detach.default,
}


class Saved:
    """Count the bytes that autograd keeps, each storage once, those of `weights` left out."""

    def __init__(self, weights: set[int]) -> None:
        self.weights, self.kept = weights, {}

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())

    def hooks(self):
        """Return a context manager that notes what autograd saves."""

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()._cdata
            if storage not in self.weights:
                self.kept[storage] = tensor  # kept alive, so that no other storage gets its address
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Give tensors in the block sizes but no values; they may mix with real ones, such as a noise schedule."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        patch.object(torch.nn.Module, "_apply", _convert),
        # PyTorch goes through lists tensor by tensor if it does not know their type
        patch.object(_foreach_utils, "_foreach_supported_types", [torch.Tensor, torch.nn.Parameter, FakeTensor]),
        # PyTorch's own copies the storage, which a fake parameter does not have
        patch.object(FakeTensor, "__deepcopy__", _copied, create=True),
    ):
        yield mode


@torch.no_grad()
def _copied(tensor: FakeTensor, memo: dict) -> Tensor:
    copy = tensor.clone()
    if isinstance(tensor, torch.nn.Parameter):
        copy = torch.nn.Parameter(copy, tensor.requires_grad)
    memo[id(tensor)] = copy
    return copy


@torch.no_grad()
def _convert(module: torch.nn.Module, function, recurse: bool = True) -> torch.nn.Module:
    """Do what Module.to, .half and the like do by replacing parameters: fake ones cannot be changed in place."""
    for child in module.children() if recurse else ():
        _convert(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(function(parameter), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def count_step(case: Case, step: int = 2) -> StepCounts:
    """Count our training step number `step` (the first is 1) over one pair of `case` on fake tensors."""
    with fake_tensors():
        trainer = _trainer(case)
        for _ in range(step - 1):
            trainer.train_step()
        operators, flops = Operators(), flop_counter()
        weights = {p.untyped_storage()._cdata for p in trainer.unet.parameters()}
        saved = Saved(weights)
        spent: Counter[tuple[str, str]] = Counter()

        def counted(name: str, function):
            """Wrap `function` so that `spent` gets the FLOPs and launches it adds."""

            def call(*arguments, **keywords):
                before = flops.get_total_flops(), operators.launches
                result = function(*arguments, **keywords)
                spent[name, "flops"] += flops.get_total_flops() - before[0]
                spent[name, "launches"] += operators.launches - before[1]
                return result

            return call

        denoise = trainer.family.denoise
        trainer.reference = counted("reference", trainer.reference)
        trainer.family.denoise = counted("denoise", denoise)
        trainer.masters.step = counted("optimizer", trainer.masters.step)
        with operators, flops, saved.hooks():
            trainer.train_step()
    return StepCounts(
        flops=flops.get_total_flops(),
        ref_flops=spent["reference", "flops"],
        forward_flops=spent["denoise", "flops"] - spent["reference", "flops"],
        bytes=operators.bytes,
        launches=operators.launches,
        ref_launches=spent["reference", "launches"],
        forward_launches=spent["denoise", "launches"] - spent["reference", "launches"],
        optimizer_launches=spent["optimizer", "launches"],
        saved=saved.bytes,
    )


def count_encoders(case: Case) -> EncoderCounts:
    """Count the FLOPs of encoding one image and one prompt."""
    with fake_tensors(), torch.no_grad():
        vae = AutoencoderKL(**case.model.vae)
        with flop_counter() as images:
            vae.encode(torch.zeros(1, 3, case.resolution, case.resolution))
        encoders = _text_encoders(case)
        with flop_counter() as prompts:
            for encoder in encoders:
                encoder(torch.zeros(1, TOKENS, dtype=torch.int64))
    return EncoderCounts(images.get_total_flops(), prompts.get_total_flops())


def _text_encoders(case: Case) -> list[torch.nn.Module]:
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    return [kind(CLIPTextConfig(**config)).eval() for kind, config in zip(kinds, case.model.text, strict=False)]


def _trainer(case: Case) -> Trainer:
    """Return our trainer with fake weights and an endless stream of one fake pair."""
    flags = {
        "pretrained_model_name_or_path": "none is read",
        "dataset_name": "none is read",
        "resolution": case.resolution,
        "tuning": case.tuning,
        "rank": RANK,
        "mixed_precision": "bf16",
        "train_batch_size": 1,
        "pairs_per_step": 1,
        "max_train_steps": 10,
        "compile": "off",
        "seed": 0,
    }
    config, _ = parse([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    ranks = Ranks(Accelerator(cpu=True, mixed_precision="no"), 0, 1, torch.device("cpu"), None)
    dtype = torch.float32 if case.tuning == "full" else torch.bfloat16
    parts = dict(
        unet=UNet2DConditionModel(**case.model.unet).to(dtype),
        vae=AutoencoderKL(**case.model.vae),
        text_encoder=None,
        tokenizer=None,
        scheduler=EulerDiscreteScheduler(**scheduler_config(case)),
    )
    if case.model.family == "sd15":
        kind, pipeline = (
            SD15,
            StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            ),
        )
    else:
        kind = Turbo if case.turbo else SDXL
        pipeline = StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None, add_watermarker=False)
    with unset_fake_temporarily():  # the noise schedule needs values
        family = kind(pipeline, dtype=torch.bfloat16, device=torch.device("cpu"))
    width, pooled = case.model.unet["cross_attention_dim"], case.model.text[-1]["projection_dim"]
    conditioning = {"prompt_embeds": torch.zeros(1, TOKENS, width, dtype=torch.float16)}
    if case.model.family == "sdxl":
        conditioning["pooled_prompt_embeds"] = torch.zeros(1, pooled, dtype=torch.float16)
    family.empty_prompt = lambda: conditioning
    masters, reference = make_trainable(config, ranks, family)
    batch = Batch(
        pixels=None,
        captions=[""],
        dropped=torch.zeros(1, dtype=torch.bool),
        pair_id=torch.zeros(1, dtype=torch.int64),
        draw=torch.zeros(1, dtype=torch.int64),
        timesteps=torch.zeros(1, dtype=torch.int64),
        label=torch.ones(1),
        weight=torch.ones(1),
        time_ids=torch.zeros(1, 6),
        bad=[],
        latents=torch.zeros(2, 4, case.latent_side, case.latent_side, dtype=torch.float16),
        conditioning=conditioning,
    )
    sets = SimpleNamespace(bad=[])
    run = Run(
        config, ranks, sets, iter(lambda: batch, None), None, [], family, masters, reference, {}, kl=torch.zeros(())
    )
    return Trainer(run, [])


def known(name: str) -> dict[str, int]:
    """Return the committed counts of a case."""
    return json.loads(FILE.read_text())["cases"][name]


def versions() -> dict[str, str]:
    """Return the versions of the libraries whose operators are counted; all builds of a version count alike."""
    names = ("torch", "diffusers", "peft", "transformers")
    return {name: importlib.metadata.version(name).split("+")[0] for name in names}


def known_versions() -> dict[str, str]:
    """Return the versions that the committed counts were made with."""
    return json.loads(FILE.read_text())["versions"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--write", action="store_true", help=f"put them into {FILE.name}, each when it is counted")
    arguments = parser.parse_args()
    cases = json.loads(FILE.read_text())["cases"] if FILE.exists() else {}
    for name in arguments.cases or CASES:
        started = time.perf_counter()
        counts, encoders = count_step(CASES[name]), count_encoders(CASES[name])
        cases[name] = asdict(counts) | {"vae_flops": encoders.vae, "text_flops": encoders.text}
        print(
            f"{name:16}{counts.flops / 1e12:8.3f} TFLOP (reference {counts.ref_flops / 1e12:.3f}, forward"
            f" {counts.forward_flops / 1e12:.3f}), {counts.bytes / 1e9:7.1f} GB, {counts.launches:6} launches"
            f" ({counts.optimizer_launches} in the optimizer), {counts.saved / 1e9:6.2f} GB saved;"
            f" VAE {encoders.vae / 1e12:.3f}, text {encoders.text / 1e12:.4f}"
            f"   [{time.perf_counter() - started:.1f} s]",
            flush=True,
        )
        if arguments.write:
            known = {name: cases[name] for name in CASES if name in cases}
            FILE.write_text(json.dumps({"versions": versions(), "cases": known}, indent=2) + "\n")


if __name__ == "__main__":
    main()
