"""`dpo_fast.score_images`: scores of images in memory or on disk."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpo_fast.data.image_files import Files
from dpo_fast.data.images import BadImage, decode
from dpo_fast.errors import BadInput
from dpo_fast.scorers import Scorer, load_scorer
from dpo_fast.scorers.by_size import batches_by_size

OF_PNG = ("1", "L", "LA", "P", "RGBA", "I", "I;16")  # modes of Pillow that its PNG files can hold, besides RGB
AnImage = str | Path | Image.Image | np.ndarray | Tensor


def score_images(
    images: Sequence[AnImage],
    prompts: Sequence[str] | str,
    scorer: Scorer | str,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 16,
    **loading: object,
) -> Tensor:
    """Return how good images are for their prompts, fp64 [N] on the CPU; each scorer has its own scale.

    images: of any sizes; a file's path, a Pillow image, or pixels as uint8 [H,W,3] (array) or [3,H,W] (tensor).
    prompts: one each, or one text for all. scorer: of `load_scorer`, or a name, which is loaded for this call on
    `device` (None: the GPU, if there is one) with the other arguments of `load_scorer`. A scorer gets at most
    `batch_size` images at once, all of one size.

    Raises BadInput for an image that does not open, a prompt or image that the scorer cannot judge, and a score that is
    not finite.
    """
    prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(images):
        raise BadInput(f"{len(images)} images need as many prompts, not {len(prompts)}: give one each, or one text")
    if isinstance(scorer, str):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        scorer = load_scorer(scorer, device, **loading)
    elif device is not None or loading:
        raise BadInput("device and the arguments of load_scorer are for a scorer's name; this scorer is loaded already")
    scorer.check(prompts)

    def opened() -> Iterator[tuple[int, Tensor]]:
        for position, image in enumerate(images):
            yield position, _pixels(image, position)

    scores = torch.empty(len(images), dtype=torch.float64)
    for batch in batches_by_size(opened(), lambda one: one[1].shape, batch_size):
        positions = [position for position, _ in batch]
        values = scorer.score(torch.stack([pixels for _, pixels in batch]), [prompts[one] for one in positions])
        scores[positions] = values.double().cpu()
    if not scores.isfinite().all():
        position = int((~scores.isfinite()).nonzero()[0])
        raise BadInput(f"images[{position}] has no finite score ({scores[position]:g}): leave it out")
    return scores


def _pixels(image: AnImage, position: int) -> Tensor:
    """Return an image as uint8 [3,H,W]."""
    if isinstance(image, (str, Path)):
        return Files([Path(image)])[0]
    if isinstance(image, Image.Image):
        image = np.array(_rgb(image, position))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
        image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0)  # an array may be mirrored, a tensor not
    if not (isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3):
        what = f"{image.dtype} {[*image.shape]}" if isinstance(image, (Tensor, np.ndarray)) else type(image).__name__
        raise BadInput(
            f"images[{position}] ({what}) is no image: give a path, a Pillow image, or uint8 pixels, [H,W,3] of an"
            " array, [3,H,W] of a tensor"
        )
    return image.contiguous()


def _rgb(image: Image.Image, position: int) -> Image.Image:
    """Return a Pillow image in RGB: over white, and in 8 bits, as a file of it would be read."""
    try:
        image.load()  # of a file that was opened only now
        if image.mode == "RGB":
            return image
        if image.mode not in OF_PNG:
            return image.convert("RGB")
        data = io.BytesIO()
        image.save(data, format="PNG")
        return decode(data.getvalue())
    except (ValueError, OSError, BadImage) as error:
        raise BadInput(
            f"images[{position}] of mode {image.mode} cannot be read ({error}): leave it out, or convert it to RGB"
        ) from error
