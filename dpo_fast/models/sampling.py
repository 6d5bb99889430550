"""Sample images from the policy and from the base model, and keep the base's samples of a run."""

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from tqdm.auto import tqdm

from dpo_fast.checksums import png_is_whole
from dpo_fast.files import read_bytes
from dpo_fast.models.family import Family
from dpo_fast.pictures import save_png, to_picture

logger = logging.getLogger(__name__)


@torch.no_grad()
def sample(
    family: Family,
    prompts: list[str],
    seeds: list[int],  # one per prompt, for its initial noise
    *,
    resolution: int,
    steps: int | None = None,  # None: the family's usual
    guidance: float | None = None,  # guidance_scale of the pipeline; None: the family's usual
    batch_size: int = 1,
    describe: str | None = None,  # title of a progress bar; None: no bar
    layouts: torch.Tensor | None = None,  # uint8 [N, 3, resolution, resolution]: images to start from; None: noise
    strength: float = 1.0,  # of the noise on a layout, in (0, 1]: the fraction of the steps that are taken
) -> torch.Tensor:
    """Sample one image per prompt: uint8 [N, 3, resolution, resolution] on the CPU.

    The pipeline's own UNet is used with its present weights. An image depends only on its prompt, seed and layout, up
    to rounding differences between batch sizes.

    With layouts this is SDEdit (arXiv 2108.01073) as in diffusers' image-to-image pipelines: of `steps` steps only the
    last int(steps * strength), which must be at least one, are taken, from the layout noised to the first of these.
    """
    family.pipeline.set_progress_bar_config(disable=True)
    images = []
    bar = tqdm(total=len(prompts), desc=describe, unit=" images", disable=describe is None)
    for first in range(0, len(prompts), batch_size):
        rows = slice(first, first + batch_size)
        pipeline, start = family.pipeline, {"height": resolution, "width": resolution}
        if layouts is not None:
            latents = family.encode_images(layouts[rows], batch_size)
            pipeline, start = _from_latents(family, latents), {"image": latents, "strength": strength}
        latents = pipeline(
            **family.sampling_inputs(prompts[rows]),
            num_inference_steps=steps or family.sampling_steps,
            guidance_scale=family.sampling_guidance if guidance is None else guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]],
            output_type="latent",  # decoded by the family: the VAE may be fp32 beside a half-precision UNet
            **start,
        ).images
        images.append(family.decode_latents(latents).cpu())
        bar.update(len(latents))
    bar.close()
    return torch.cat(images)


@dataclass(frozen=True)
class SampleSettings:
    """How a run samples its prompts while it trains."""

    folder: Path  # where the pictures are kept
    seed: int  # of the first prompt's noise; the k-th prompt has seed + k
    resolution: int  # pixels per side
    steps: int | None  # None: the model's usual
    guidance: float | None  # None: the model's usual


def run_samples(family: Family, prompts: list[str], settings: SampleSettings) -> list[Image.Image]:
    """Sample every prompt with a run's settings and the UNet's present weights."""
    images = sample(
        family,
        prompts,
        [settings.seed + k for k in range(len(prompts))],
        resolution=settings.resolution,
        steps=settings.steps,
        guidance=settings.guidance,
    )
    return [to_picture(image) for image in images]


def base_samples(
    family: Family,
    prompts: list[str],
    settings: SampleSettings,
    base: str,  # identifies the base model's weights
    *,
    again: bool = False,
) -> list[Image.Image]:
    """Return a run's samples of the base model, kept in samples/base-N.png.

    If one is missing, damaged or of other settings, or with `again`, all are drawn (the UNet must hold the base's
    weights) and the unusable ones are written again. Raises OSError.
    """
    files = [settings.folder / f"base-{k}.png" for k in range(len(prompts))]
    about = [
        {"prompt": prompt, "seed": str(settings.seed + k), "resolution": str(settings.resolution), "base": base}
        for k, prompt in enumerate(prompts)
    ]
    kept = [None if again else _kept(file, texts) for file, texts in zip(files, about, strict=True)]
    if None not in kept:
        return kept
    drawn = run_samples(family, prompts, settings)
    for image, file, texts, before in zip(drawn, files, about, kept, strict=True):
        if before is None:
            save_png(image, file, texts)
    return drawn


def _kept(file: Path, about: Mapping[str, str]) -> Image.Image | None:
    """Return the image in a file of `save_png`; None if it is missing, has changed, or is not about `about`."""
    try:
        data = read_bytes(file)
    except FileNotFoundError:
        return None
    if png_is_whole(data):
        with Image.open(io.BytesIO(data)) as image:
            if about.items() <= image.info.items():
                return image.convert("RGB")
    logger.warning("%s is damaged, or not of this run: it is drawn again", file)
    return None


def _from_latents(family: Family, latents: torch.Tensor):
    """Return an image-to-image pipeline of the family's own components that starts from `latents` [N,C,h,w].

    An unmodified pipeline would encode images itself, in the UNet's dtype, and sample the posterior before the noise.
    """
    scheduler = family.pipeline.scheduler
    pipeline = family.image_to_image_class(**family.pipeline.components, **family.image_to_image_options())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.image_processor = VaeImageProcessor(vae_latent_channels=latents.shape[1])  # passes latents through

    def prepare_latents(image, timestep, batch_size, num_images_per_prompt, dtype, device, generator=None, *_):
        noise = randn_tensor(latents.shape, generator=generator, device=device, dtype=dtype)
        return scheduler.add_noise(latents.to(device, dtype), noise, timestep)

    pipeline.prepare_latents = prepare_latents
    return pipeline
