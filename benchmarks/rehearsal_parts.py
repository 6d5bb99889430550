"""The phases of the rehearsal that are not commands of the package: `python -m benchmarks.rehearsal_parts PART ...`.

make FOLDER CASE RESOLUTION DTYPE    a pipeline with random weights and two pairs
policy FOLDER RESOLUTION             the predictions of base and policy, by our code from the checkpoint
read FOLDER                          the same by diffusers alone, from the exported LoRA; compares the two
"""

import json
import sys
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from packaging.version import Version
from safetensors.torch import load_file, save_file

from benchmarks.rehearsal import RANK, SEED
from benchmarks.step.cases import CASES, scheduler_config
from benchmarks.step.prepare import save_pipeline, write_pairs
from dpo_fast.models.lora import WEIGHT_NAME
from dpo_fast.models.source import ModelSource

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"
PAIRS = 2
TIMESTEP = 500
CAPTION = "a photograph of the number 0, with a soft background"


def make(folder: Path, case: str, resolution: int, dtype: str) -> None:
    """Write FOLDER/model, every weight in `dtype`, and FOLDER/pairs.parquet."""
    model = CASES[case].model
    config = scheduler_config(CASES[case])
    if model.family == "sd15":
        scheduler = PNDMScheduler(**config, skip_prk_steps=True, set_alpha_to_one=False)
    else:
        scheduler = EulerDiscreteScheduler(**config)
    save_pipeline(model, folder / "model", scheduler, dtype=DTYPES[dtype], vae_dtype=DTYPES[dtype])
    write_pairs(folder / "pairs.parquet", PAIRS, resolution)


@torch.no_grad()
def policy(folder: Path, resolution: int) -> None:
    """Write FOLDER/policy.safetensors: one input of the UNet, and what base and policy predict for it."""
    from dpo_fast.models import add_lora, load_family
    from dpo_fast.models.lora import AdapterSwitch
    from dpo_fast.training import checkpoint

    family = load_family(ModelSource(str(folder / "model")), dtype=torch.bfloat16, device="cpu")
    unet = family.unet
    add_lora(unet, RANK, RANK, seed=SEED)
    files, _ = checkpoint.load(checkpoint.find(folder / "run", "latest"))
    trained = {name: parameter for name, parameter in unet.named_parameters() if name in files["weights"]}
    assert trained.keys() == files["weights"].keys()
    for name, parameter in trained.items():
        parameter.data = files["weights"][name].to(torch.bfloat16)
    generator = torch.Generator().manual_seed(SEED)
    noisy = torch.randn(2, *family.latent_shape(resolution), generator=generator).to(torch.bfloat16)
    conditioning = family.encode_prompts([CAPTION])
    if family.needs_time_ids:
        conditioning["time_ids"] = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]]).float()
    timesteps = torch.tensor([TIMESTEP])
    inputs = (noisy.contiguous(memory_format=torch.channels_last), timesteps, conditioning)
    tensors = {"noisy": noisy, "policy": family.denoise(unet, *inputs), **conditioning}
    with AdapterSwitch(unet).off():
        tensors["base"] = family.denoise(unet, *inputs)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "policy.safetensors")


@torch.no_grad()
def read(folder: Path) -> None:
    """Write FOLDER/read.json: how far diffusers' predictions from the exported files are from ours.

    Differences are rms(a - b) / rms(b). rounding: diffusers' base prediction against ours, by the same weights;
    difference: diffusers' policy prediction against ours; effect: diffusers' policy prediction against its base one.
    """
    ours = load_file(folder / "policy.safetensors")
    pipeline = DiffusionPipeline.from_pretrained(folder / "model", **{DTYPE_ARGUMENT: torch.bfloat16})
    base = _predict(pipeline.unet, ours)
    pipeline.load_lora_weights(folder / "run", weight_name=WEIGHT_NAME)
    result = _predict(pipeline.unet, ours)

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = a.double(), b.double()
        return ((a - b).square().mean() / b.square().mean()).sqrt().item()

    found = {
        "rounding": difference(base, ours["base"]),
        "difference": difference(result, ours["policy"]),
        "effect": difference(result, base),
        "prediction_rms": ours["policy"].double().square().mean().sqrt().item(),
    }
    (folder / "read.json").write_text(json.dumps(found, allow_nan=False))


def _predict(unet: UNet2DConditionModel, ours: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the prediction [2,C,h,w] for the input that our code used."""
    both = {name: torch.cat((tensor, tensor)) for name, tensor in ours.items()}
    added = None
    if "time_ids" in ours:
        pooled = both["pooled_prompt_embeds"].to(unet.dtype)
        added = {"text_embeds": pooled, "time_ids": both["time_ids"].to(unet.dtype)}
    states = both["prompt_embeds"].to(unet.dtype)
    return unet(ours["noisy"], TIMESTEP, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False)[0]


if __name__ == "__main__":
    part, folder, *more = sys.argv[1:]
    if part == "make":
        make(Path(folder), more[0], int(more[1]), more[2])
    elif part == "policy":
        policy(Path(folder), int(more[0]))
    else:
        read(Path(folder))
