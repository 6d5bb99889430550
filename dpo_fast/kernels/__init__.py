"""The ops of a Diffusion-DPO step as functions on tensors, each with several implementations (dispatch.py)."""

from dpo_fast.kernels.dpo_loss import DPOLoss, dpo_loss
from dpo_fast.kernels.noise_pair import NoisePair, noise_pair
from dpo_fast.kernels.pair_errors import PairErrors, pair_errors

__all__ = ["DPOLoss", "NoisePair", "PairErrors", "dpo_loss", "noise_pair", "pair_errors"]
