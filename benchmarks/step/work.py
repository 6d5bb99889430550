"""The work that all providers of a run share: the same weights, images, latents, embeddings, noise and timesteps.

`prepare.py` writes it to a folder; here it is read back as plain tensors.
"""

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

PROOF_STEPS = 6  # the loss at the sixth step depends on five updates
BETA = 5000.0


@dataclass(frozen=True)
class Settings:
    """The settings that all providers of a run share."""

    case: str
    device: str  # cpu or cuda
    dtype: str  # fp32, fp16 or bf16
    batch_size: int  # pairs per forward pass, for ours and tuned
    steps: int  # optimizer steps with data prepared
    learning_rate: float
    compiled: bool = True  # whether ours and tuned compile the UNet's blocks

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.dtype]

    def write(self, folder: Path) -> None:
        (folder / "settings.json").write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(folder: Path) -> "Settings":
        return Settings(**json.loads((folder / "settings.json").read_text()))


class Work:
    """The pairs of a run: the tensors of each step, and the encoded images and captions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = load_file(folder / "work.safetensors")
        self.lora = load_file(folder / "lora.safetensors") if (folder / "lora.safetensors").exists() else {}
        self.table = pq.read_table(folder / "pairs.parquet").to_pydict()

    def step(self, index: int) -> dict[str, Tensor]:
        """Return one step's tensors: latents fp16 [2P,4,h,w] (chosen first), noise fp32 [P,4,h,w], timesteps int64 [P],
        rows int64 [P], prompt_embeds fp16 [P,77,D], and for SDXL pooled_prompt_embeds fp16 [P,D], time_ids fp32 [P,6].
        """
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def images(self, row: int) -> tuple[bytes, bytes]:
        """Return the encoded images of a row, chosen first."""
        first, second = self.table["jpg_0"][row], self.table["jpg_1"][row]
        return (first, second) if self.table["label_0"][row] == 1 else (second, first)

    def caption(self, row: int) -> str:
        return self.table["caption"][row]


def decoded(encoded: bytes, resolution: int) -> Tensor:
    """Decode a JPEG as the public scripts do: short side resized, centre crop, fp32 [3,R,R] in [-1, 1]."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    scale = resolution / min(image.size)
    if scale != 1:
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - resolution) // 2 for side in image.size)
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.contiguous().float().div(255).sub(0.5).div(0.5)
