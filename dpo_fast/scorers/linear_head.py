"""The head that the aesthetic predictor and ImageReward share: five linear layers without activations."""

from torch import nn


def linear_head(width: int) -> nn.Sequential:
    """Return the head, [B,width] -> [B,1], in eval mode; layers are named as in the published files (0, 2, 4, 6, 7)."""
    layers = [nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64)]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)).requires_grad_(False).eval()
