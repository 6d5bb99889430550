"""One UNet in variants of how it runs: memory order, what is compiled, what is kept for the backward pass.

    python benchmarks/variants.py [--model sdxl|sd15] [--tuning lora|full] [--width 64] [--size 32] [--dtype fp32]
        [--json FILE]

The UNet has the blocks of the real one at a fraction of its width and depth, every parameter random. `step` is a
forward and a backward pass of two images, `reference` a forward pass as the reference runs it (without a graph and
without adapters), `with both` one with graph and adapters, `kept` what a forward pass keeps for the backward. Times are
medians of rounds in which the variants take turns: on a CPU of processor time on one thread, which other programs
disturb little; on a GPU of wall time. `compile` is what the first step takes beyond a later one. "free rounding" lets
Inductor keep in fp32 what it fuses; the others round where eager blocks do (dpo_fast/models/compiling.py).
"""

import argparse
import copy
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # so that compilers are children of this process

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from dpo_fast.choices.unet import randomise
from dpo_fast.files import write_json
from dpo_fast.models import COMPUTE_DTYPES, AdapterSwitch, add_lora
from dpo_fast.models.compiling import OPTIONS

MODELS = {
    "sdxl": dict(
        block_out_channels=(1, 2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 64,
    ),
    "sd15": dict(block_out_channels=(1, 2, 4, 4)),
}
BLOCKS = {"transformer blocks": {"BasicTransformerBlock"}, "and resnets": {"BasicTransformerBlock", "ResnetBlock2D"}}
DTYPES = {"fp32": COMPUTE_DTYPES["no"], "fp16": COMPUTE_DTYPES["fp16"], "bf16": COMPUTE_DTYPES["bf16"]}
ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="sdxl")
    parser.add_argument("--tuning", choices=["lora", "full"], default="lora")
    parser.add_argument("--width", type=int, default=64, help="channels of the first block")
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--no_compile", action="store_true", help="leave the compiled variants out")
    parser.add_argument("--more", action="store_true", help="also resnets: minutes of compiling")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    plain = unet(arguments)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    variants = {"contiguous": plain, "channels_last": last}
    for name, blocks in ({} if arguments.no_compile else BLOCKS).items():
        if name == "transformer blocks" or arguments.more:
            for order, original in (("contiguous", plain), ("channels_last", last)):
                variants[f"{order}, {name}"] = compiled(copy.deepcopy(original), blocks, OPTIONS)
    if not arguments.no_compile:
        variants["channels_last, free rounding"] = compiled(copy.deepcopy(last), BLOCKS["transformer blocks"], {})

    given = inputs(plain, arguments)
    first = {name: clock(lambda u=u: step(u, given), arguments.device) for name, u in variants.items()}
    kinds: dict[str, Callable] = {"step": step, "reference": reference, "with both": with_both}
    times = {
        kind: interleaved({name: lambda u=u, f=f: f(u, given) for name, u in variants.items()}, arguments.device)
        for kind, f in kinds.items()
    }
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "one CPU thread"
    print(f"{where}, torch {torch.__version__}, python {platform.python_version()}: {vars(arguments)}")
    print(f"{'':36}{'step ms':>9}{'reference':>10}{'with both':>10}{'kept MB':>9}{'compile s':>10}{'x first row':>12}")
    rows = []
    for name, u in variants.items():
        row = {"variant": name, **{f"{kind.replace(' ', '_')}_ms": found[name] * 1e3 for kind, found in times.items()}}
        row |= {"kept_mb": kept(u, given) / 1e6, "compile_s": first[name] - times["step"][name]}
        row["times_as_fast_as_first"] = times["step"]["contiguous"] / times["step"][name]
        rows.append(row)
        print(
            f"{name:36}{row['step_ms']:9.0f}{row['reference_ms']:10.0f}{row['with_both_ms']:10.0f}{row['kept_mb']:9.1f}"
            f"{row['compile_s']:10.1f}{row['times_as_fast_as_first']:12.2f}",
            flush=True,
        )
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        write_json(arguments.json, {"device": where, "torch": torch.__version__, **settings, "rows": rows})


def unet(arguments: argparse.Namespace) -> nn.Module:
    """Build the UNet, every parameter random at a scale that keeps activations near one."""
    config = dict(MODELS[arguments.model])
    widths = tuple(arguments.width * factor for factor in config.pop("block_out_channels"))
    torch.manual_seed(0)
    heads = tuple(max(1, width // 64) for width in widths) if arguments.model == "sdxl" else 8
    made = UNet2DConditionModel(
        sample_size=arguments.size,
        block_out_channels=widths,
        cross_attention_dim=128,
        attention_head_dim=heads,
        norm_num_groups=8,
        **config,
    ).eval()
    randomise(made)
    if arguments.tuning == "lora":
        add_lora(made, 8, 8)
        made.to(memory_format=torch.contiguous_format)
    else:
        made.requires_grad_(True)
    return made.to(arguments.device, DTYPES[arguments.dtype])


def compiled(made: nn.Module, blocks: set[str], options: dict[str, object]) -> nn.Module:
    for module in made.modules():
        if type(module).__name__ in blocks:
            module.compile(fullgraph=True, dynamic=False, options=options)
    return made


def inputs(made: nn.Module, arguments: argparse.Namespace) -> tuple[tuple, dict]:
    """Return the inputs for two images: latents and timesteps, and the conditioning."""
    size, dtype, device = arguments.size, DTYPES[arguments.dtype], arguments.device
    noisy = torch.randn(2, 4, size, size).to(device, dtype)
    more = {"encoder_hidden_states": torch.randn(2, 77, 128).to(device, dtype), "return_dict": False}
    if arguments.model == "sdxl":
        time_ids = torch.full((2, 6), 8.0 * size, device=device)
        more["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 64).to(device, dtype), "time_ids": time_ids}
    return (noisy, torch.tensor([20, 700], device=device)), more


def call(made: nn.Module, given: tuple[tuple, dict]) -> Tensor:
    (noisy, timesteps), more = given
    last = made.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return made(noisy.contiguous(memory_format=layout), timesteps, **more)[0]


def step(made: nn.Module, given: tuple[tuple, dict]) -> None:
    call(made, given).float().square().mean().backward()
    made.zero_grad(set_to_none=True)


@torch.no_grad()
def reference(made: nn.Module, given: tuple[tuple, dict]) -> None:
    with AdapterSwitch(made).off():
        call(made, given)


def with_both(made: nn.Module, given: tuple[tuple, dict]) -> None:
    call(made, given).detach()


def kept(made: nn.Module, given: tuple[tuple, dict]) -> int:
    """Return the bytes of activations that a forward pass keeps for the backward."""
    weights = {parameter.untyped_storage()._cdata for parameter in made.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        prediction = call(made, given)
    del prediction
    return sum(found.values())


def clock(work: Callable, device: str) -> float:
    """Return the seconds that `work` takes: processor time on a CPU, wall time on a GPU."""
    now = time.perf_counter if device == "cuda" else processor_time
    started = now()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return now() - started


def processor_time() -> float:
    """Return the CPU seconds of this process and of the compilers it has called."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def interleaved(calls: dict[str, Callable], device: str) -> dict[str, float]:
    for work in calls.values():
        work()
    rounds = [{name: clock(work, device) for name, work in calls.items()} for _ in range(ROUNDS)]
    return {name: sorted(r[name] for r in rounds)[ROUNDS // 2] for name in calls}


if __name__ == "__main__":
    main()
