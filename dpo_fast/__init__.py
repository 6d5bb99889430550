"""dpo_fast: align text-to-image diffusion models with human preferences by Diffusion-DPO (arXiv 2311.12908)."""

__version__ = "0.1.0"

from dpo_fast import quiet as quiet  # first of all: before any library that it quietens is imported
