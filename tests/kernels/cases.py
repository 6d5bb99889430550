"""The shapes, dtypes and options that every implementation of the kernels is tested and timed at."""

from dataclasses import dataclass

import torch
from torch import Tensor

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """One call of the kernels."""

    name: str
    pairs: int = 2
    shape: tuple[int, int, int] = (4, 8, 8)  # C, H, W
    policy: torch.dtype = F32
    ref: torch.dtype | None = F32  # dtype of the reference's predictions; None: its errors instead
    target: torch.dtype = F32
    targets_per_pair: int = 1
    channels_last: bool = False
    labels: bool = False
    weights: bool = False
    beta: float = 5000.0

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("one_pair", pairs=1),
    Case("odd", pairs=3, shape=(4, 7, 5)),
    Case("one_number", pairs=2, shape=(1, 1, 1)),
    Case("one_channel", pairs=2, shape=(1, 9, 3), targets_per_pair=2),
    Case("five_channels", pairs=2, shape=(5, 3, 9)),
    Case("prime_width", pairs=5, shape=(4, 1, 1031)),
    Case("bf16", policy=BF16, ref=BF16, pairs=3, shape=(4, 9, 7)),
    Case("fp16", policy=F16, ref=F16, pairs=3, shape=(4, 9, 7), targets_per_pair=2),
    Case("bf16_policy_fp32_ref", policy=BF16, ref=F32),
    Case("fp32_policy_fp16_ref", policy=F32, ref=F16),
    Case("fp16_policy_bf16_ref", policy=F16, ref=BF16, target=BF16),
    Case("ref_errors", policy=BF16, ref=None, pairs=3),
    Case("ref_errors_fp32", ref=None, targets_per_pair=2),
    Case("channels_last", channels_last=True, policy=BF16, ref=BF16, pairs=3),
    Case("channels_last_odd", channels_last=True, pairs=2, shape=(3, 5, 7), targets_per_pair=2),
    Case("labels", pairs=4, labels=True),
    Case("weights", pairs=4, weights=True),
    Case("labels_weights_bf16", pairs=7, policy=BF16, ref=BF16, labels=True, weights=True, beta=2000.0),
    Case("small_beta", beta=0.1),
]

# what a training step at these resolutions gives the kernels; for timing
STEP_CASES = [
    Case("sd15-512", pairs=8, shape=(4, 64, 64), policy=F16, ref=F16),
    Case("sdxl-1024", pairs=4, shape=(4, 128, 128), policy=BF16, ref=BF16),
    Case("sdxl-1024-channels-last", pairs=4, shape=(4, 128, 128), policy=BF16, ref=BF16, channels_last=True),
    Case("turbo-512", pairs=8, shape=(4, 64, 64), policy=F16, ref=F16),
]


@dataclass
class LossInputs:
    """Arguments of dpo_loss and, without the last three, of pair_errors."""

    policy_pred: Tensor
    ref: Tensor
    target: Tensor
    beta: float
    label: Tensor | None
    weight: Tensor | None


def loss_inputs(case: Case, seed: int, device: str | torch.device | None = None) -> LossInputs:
    """Predictions as in training: unit targets, a policy near its reference, both some way from the target.

    Drawn on the CPU, the same for every device; None is the default device, which in a test is its backend's.
    """
    device = torch.get_default_device() if device is None else device
    generator = torch.Generator().manual_seed(seed)

    def normal(images: int) -> Tensor:
        return torch.randn(images, *case.shape, generator=generator, device="cpu")

    def placed(x: Tensor, dtype: torch.dtype) -> Tensor:
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        return x.to(device=device, dtype=dtype).contiguous(memory_format=layout)

    target = normal(case.pairs * case.targets_per_pair)
    ref = target.repeat(2 // case.targets_per_pair, 1, 1, 1) + 0.3 * normal(2 * case.pairs)
    policy = ref + 3e-3 * normal(2 * case.pairs)
    if case.ref is None:
        full_target = target.double().repeat(2 // case.targets_per_pair, 1, 1, 1)
        ref = (ref.double() - full_target).square().mean((1, 2, 3)).float().to(device)
    else:
        ref = placed(ref, case.ref)
    return LossInputs(
        placed(policy, case.policy).requires_grad_(),
        ref,
        placed(target, case.target),
        case.beta,
        torch.rand(case.pairs, generator=generator, device="cpu").to(device) if case.labels else None,
        torch.rand(case.pairs, generator=generator, device="cpu").to(device) if case.weights else None,
    )


@dataclass
class NoiseInputs:
    """Arguments of noise_pair without prediction_type and dtype."""

    latents: Tensor
    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    seed: int
    pair_id: Tensor
    draw: Tensor


def noise_inputs(case: Case, seed: int, device: str | torch.device | None = None) -> NoiseInputs:
    """Latents in the policy's dtype, timesteps from nearly clean to pure noise, ids and seed of more than 32 bits."""
    device = torch.get_default_device() if device is None else device
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2 * case.pairs, *case.shape, generator=generator, device="cpu")
    abar = torch.rand(case.pairs, generator=generator, dtype=torch.float64, device="cpu")
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return NoiseInputs(
        latents.to(device=device, dtype=case.policy).contiguous(memory_format=layout),
        abar.sqrt().float().to(device),
        (1 - abar).sqrt().float().to(device),
        int(torch.randint(1 << 62, (), generator=generator, device="cpu")),
        torch.randint(1 << 40, (case.pairs,), generator=generator, device="cpu").to(device),
        torch.randint(1 << 28, (case.pairs,), generator=generator, device="cpu").to(device),
    )


def difference_terms(policy: Tensor, ref: Tensor, target: Tensor) -> Tensor:
    """What the terms of error_delta add up to without their signs, float64 [2B]: mean |(p - r) (p + r - 2 t)|."""
    policy, ref, target = policy.detach().double(), ref.double(), target.double()
    target = target.repeat(policy.shape[0] // target.shape[0], 1, 1, 1)
    return ((policy - ref) * (policy + ref - 2 * target)).abs().mean((1, 2, 3))


def assert_near_truth(actual: Tensor, baseline: Tensor, truth: Tensor, magnitude: Tensor) -> None:
    """No further from the truth than twice the baseline, which is PyTorch in the same dtype, and 4 ulp of the terms.

    truth and magnitude are float64, magnitude the sum of the absolute values of the terms that make up a number; ulp
    are those of the dtype of `actual`. The baseline's error is its worst over the tensor.
    """
    assert actual.shape == truth.shape and actual.dtype == baseline.dtype
    assert torch.isfinite(actual).all()
    info = torch.finfo(actual.dtype)
    ulp = (magnitude * info.eps).clamp(min=info.smallest_normal * info.eps)
    allowed = 2 * (baseline.double() - truth).abs().max() + 4 * ulp
    error = (actual.double() - truth).abs()
    assert (error <= allowed).all(), f"error {error.max():.3g}, allowed {allowed[error > allowed].min():.3g}"
