"""The memory order of a UNet's convolution weights and of the latents it is given: channels_last or contiguous."""

import torch
from torch import nn

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def format_of(order: str) -> torch.memory_format:
    """Return PyTorch's memory format for an order; "auto" is channels_last, which most convolutions prefer.

    Raises KeyError for an unknown name.
    """
    return FORMATS["channels_last" if order == "auto" else order]


def memory_format(unet: nn.Module) -> torch.memory_format:
    """Return the memory format that a UNet's first convolution has."""
    last = unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
