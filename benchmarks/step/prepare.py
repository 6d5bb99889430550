"""Write what the providers of a run share: random weights, JPEGs, and the draws of our own training stream.

The peers get the latents, embeddings, noise and timesteps that ours trains on as plain tensors, so that every provider
computes the same loss; what a public script encodes in its step, it still encodes, and is timed for.
"""

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.step import ours
from benchmarks.step.cases import CASES, Model, scheduler_config
from benchmarks.step.work import Settings
from dpo_fast.kernels import noise_pair
from tests.helpers.pipelines import tokenizer

ROWS_A_STEP = 4  # the data set holds the pairs of this many steps; after them its next epoch begins


def prepare(folder: Path, settings: Settings) -> None:
    """Fill `folder`; the first provider to open it finds everything cached."""
    case = CASES[settings.case]
    settings.write(folder)
    scheduler = EulerDiscreteScheduler(**scheduler_config(case))
    save_pipeline(case.model, folder / "model", scheduler, dtype=settings.torch_dtype, device=settings.device)
    write_pairs(folder / "pairs.parquet", ROWS_A_STEP * case.pairs, case.resolution)
    run = ours.opened(folder, ours.flags(folder, "prepare", compiled=False))
    if case.tuning == "lora":
        adapters = {n: p.detach().float().cpu() for n, p in run.family.unet.named_parameters() if p.requires_grad}
        save_file({name: tensor.contiguous().clone() for name, tensor in adapters.items()}, folder / "lora.safetensors")
    passes = case.pairs // settings.batch_size
    steps = []
    for _ in range(settings.steps):
        batches = [batch.to(settings.device) for batch in islice(run.batches, passes)]
        steps.append(_step(run, batches))
    stacked = {name: torch.stack([step[name] for step in steps]).cpu().contiguous() for name in steps[0]}
    save_file(stacked, folder / "work.safetensors")


def _step(run, batches) -> dict[str, torch.Tensor]:
    """Return one step's tensors, joined from its micro-batches."""
    latents = torch.cat([b.latents.chunk(2)[side] for side in (0, 1) for b in batches])
    parts = {
        "latents": latents,
        "timesteps": torch.cat([b.timesteps for b in batches]),
        "rows": torch.cat([b.pair_id for b in batches]),
    }
    for name in batches[0].conditioning:
        parts[name] = torch.cat([b.conditioning[name] for b in batches])
    if run.family.needs_time_ids:
        parts["time_ids"] = torch.cat([b.time_ids for b in batches])
    schedule = run.family.schedule
    parts["noise"] = noise_pair(  # an epsilon target is the noise itself
        latents,
        schedule.sqrt_alpha_bar[parts["timesteps"]],
        schedule.sqrt_one_minus_alpha_bar[parts["timesteps"]],
        run.config.seed,
        parts["rows"],
        torch.cat([b.draw for b in batches]),
        prediction_type="epsilon",
        dtype=torch.float32,
        backend="reference",
    ).target
    return parts


def save_pipeline(
    model: Model,
    folder: Path,
    scheduler: SchedulerMixin,
    *,
    dtype: torch.dtype,  # of the UNet and the text encoders
    vae_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Write a pipeline of the model's architecture with every parameter random, norms included, drawn on `device`.

    Each parameter is drawn in fp32 and rounded into a module that holds `dtype` from the beginning, so the largest
    model takes its size in `dtype` plus one tensor.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(build, kept: torch.dtype = dtype) -> nn.Module:
        with torch.device("meta"):
            module = build()
        module = module.to(kept).to_empty(device=device)
        randomise(module, generator)
        return module

    vae = random(lambda: AutoencoderKL(**model.vae), vae_dtype)
    with torch.no_grad():  # a trained VAE's raw latents have a standard deviation of 1 / scaling_factor
        vae.quant_conv.weight /= vae.config.scaling_factor
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    texts = [
        random(lambda kind=kind, config=config: kind(CLIPTextConfig(**config)))
        for kind, config in zip(kinds, model.text, strict=False)
    ]
    vocabulary = model.text[0]["vocab_size"]
    parts = dict(
        unet=random(lambda: UNet2DConditionModel(**model.unet)),
        vae=vae,
        text_encoder=texts[0],
        tokenizer=tokenizer(pad_token="<|endoftext|>", vocabulary=vocabulary),
        scheduler=scheduler,
    )
    if model.family == "sd15":
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    else:
        pipeline = StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=texts[1],
            tokenizer_2=tokenizer(pad_token="!", vocabulary=vocabulary),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Set every parameter to random values at a scale that keeps activations near one."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            if isinstance(part, nn.Embedding):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise if name == "bias" else 1 + 0.2 * noise)


def write_pairs(path: Path, count: int, side: int) -> None:
    """Write a Parquet file with Pick-a-Pic's columns: `count` rows of random JPEGs of `side` pixels."""
    random = np.random.default_rng(0)

    def picture() -> bytes:
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = random.integers(-12, 13, smooth.shape, dtype=np.int16)
        out = io.BytesIO()
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        return out.getvalue()

    columns = {
        "jpg_0": [picture() for _ in range(count)],
        "jpg_1": [picture() for _ in range(count)],
        "label_0": [float(row % 2) for row in range(count)],
        "caption": [f"a photograph of the number {row}, with a soft background" for row in range(count)],
    }
    pq.write_table(pa.table(columns), path)
