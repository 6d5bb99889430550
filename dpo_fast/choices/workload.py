"""What a run computes in one training pass, as far as it matters for how fast and how exactly a machine does it."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from dpo_fast.choices import pair_ops
from dpo_fast.models import DEFAULT_TARGETS

# The published UNets, as far as they differ from diffusers' defaults, which are those of Stable Diffusion 1.
SD15 = dict(
    in_channels=4,
    sample_size=64,
    block_out_channels=(320, 640, 1280, 1280),
    attention_head_dim=8,
    cross_attention_dim=768,
)
SDXL = dict(
    in_channels=4,
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


@dataclass(frozen=True)
class Workload:
    """One training pass. Equal workloads on equal machines have equal outcomes."""

    device: str  # such as "cuda:0"
    dtype: str  # compute dtype, such as "bfloat16"
    pairs: int  # a forward pass
    latent: int  # side of the latents
    unet: dict[str, Any]  # the UNet's configuration
    tokens: int  # a caption
    tuning: str = "lora"  # or "full"
    targets: tuple[str, ...] = DEFAULT_TARGETS  # of the adapters
    recompute: str = "none"  # gradient checkpointing: or "selective" or "full"
    reference: str = "online"  # or "cached" or "none"
    prediction_type: str = "epsilon"  # or "v_prediction"
    labels: bool = False  # soft labels
    tf32: bool = False

    def for_unet(self) -> dict[str, Any]:
        """The arguments of the plan `unet`."""
        values = asdict(self) | {"targets": list(self.targets)}
        values["unet"] = {name: value for name, value in self.unet.items() if not name.startswith("_")}
        del values["prediction_type"], values["labels"]
        return values

    def for_pair_ops(self, memory_order: str) -> dict[str, Any]:
        """The arguments of the plan `pair_ops`."""
        shape = pair_ops.Shape(
            self.pairs,
            (self.unet["in_channels"], self.latent, self.latent),
            getattr(torch, self.dtype),
            self.prediction_type,
            reference_errors=self.reference == "cached",
            channels_last=memory_order == "channels_last",
            labels=self.labels,
        )
        return shape.as_arguments(self.device)
