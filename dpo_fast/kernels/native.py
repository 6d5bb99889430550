"""The ops in C++ and CUDA: check tensors and pass their addresses to the extension dpo_fast._native (csrc/ops.h).

Noise, and gradients at given margins, are bit-identical to the Triton kernels'. CPU results do not depend on the number
of threads. The CUDA kernels are experimental: they compile but have not run on a GPU yet, so dispatch uses them only
when they are requested. The extension does not depend on PyTorch: one build serves every version of it.
"""

import functools
import os
import re
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dpo_fast.kernels.reference import memory_format
from dpo_fast.version import compiled_for

try:
    _native: Any = import_module("dpo_fast._native")
except ImportError as error:
    raise ImportError(
        f"{error}; to build it, with a C++ compiler on the PATH: DPO_FAST_BUILD=cpu pip install -e . (in the source)"
    ) from error

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in csrc/ops.h
_PER_THREAD = 1 << 14  # fewer elements than this are not worth another thread
_process = os.getpid()


def reason_against(device_type: str) -> str:
    """Return, in one line, why the kernels cannot run on this type of device ("cpu" or "cuda"); "" where they can."""
    if device_type == "cuda":
        return _cuda_fault(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return "" if device_type == "cpu" else f"no kernels for {device_type}"


@functools.cache
def _cuda_fault(device: int) -> str:
    """Load all kernels onto a device; return why they cannot run there, or "".

    Kernels are loaded here rather than at their first launches because loading is an error while a CUDA graph is being
    captured. This function itself has to be called before the capture; otherwise it raises RuntimeError.
    """
    if not torch.cuda.is_available():
        return _native.cuda_fault(device)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"backend 'native' is used on cuda:{device} for the first time while a CUDA graph is captured, where"
                " its kernels cannot be loaded; call an op once on that device before the capture"
            )
        return _native.cuda_fault(device)


def build() -> str:
    """Describe in one line what the extension was compiled for and, if it has no CUDA kernels, why not."""
    return compiled_for(_native) if _native.cuda_cubins else f"{compiled_for(_native)}; {_native.cuda_fault(0)}"


def code_on(capability: tuple[int, int]) -> str:
    """Describe in one line what a GPU of this capability runs: compiled code, PTX compiled by the driver, or nothing.

    Returns "" if the extension was built without CUDA.
    """
    cubins, name = _native.cuda_cubins.split(","), "sm_{}{}".format(*capability)
    if cubins == [""]:
        return ""
    if fitting := [arch for arch in cubins if runs_on(capability, arch, is_ptx=False)]:
        return f"compiled code of sm_{fitting[-1]}"
    remedy = f"install dpo_fast again on this machine, or with DPO_FAST_CUDA_ARCHS={name.removeprefix('sm_')}"
    if runs_on(capability, _native.cuda_ptx, is_ptx=True):
        return (
            f"JIT: the build has no code for {name}, so the driver compiles its PTX of compute_{_native.cuda_ptx} when"
            f" the kernels are loaded; to avoid that, {remedy}"
        )
    return f"none: the build has neither code nor PTX for {name}; {remedy}"


def runs_on(capability: tuple[int, int], arch: str, is_ptx: bool) -> bool:
    """Whether a GPU of a compute capability runs code compiled for `arch` (80, 90a, 100f), or its PTX.

    Code runs on the same major version from its minor version up, PTX on any capability that is not older. With the
    suffix a, both run on exactly that capability; with f, on its family, which is the same major version from its minor
    version up. (CUDA programming guide, "Binary Compatibility", "PTX Compatibility", "Feature Set Compiler Targets";
    Tegra's own capabilities are left out.)
    """
    digits, suffix = re.fullmatch(r"(\d+)([af]?)", arch).groups()
    built = divmod(int(digits), 10)
    if suffix == "a":
        return capability == built
    return capability >= built if is_ptx and not suffix else capability[0] == built[0] and capability >= built


# noise_pair


def noise_pair_fwd(
    latents: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: int,
    pair_id: Tensor,
    draw: Tensor,
    prediction_type: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute `kernels.noise_pair` on checked arguments.

    latents [2B,C,H,W] of any float dtype; sqrt_alpha_bar and sqrt_one_minus_alpha_bar float32 [B]; pair_id and draw
    int64 [B]. Returns the noisy latents [2B,C,H,W] in `dtype` and the target in float32: the noise [B,C,H,W] for
    prediction_type epsilon, the velocity [2B,C,H,W] for v_prediction.
    """
    if dtype == torch.float64:  # the arithmetic is float32 even then
        noisy, target = noise_pair_fwd(
            latents, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, pair_id, draw, prediction_type, torch.float32
        )
        return noisy.double(), target
    images, channels, height, width = latents.shape
    pairs, layout = images // 2, memory_format(latents)
    velocity = prediction_type == "v_prediction"
    noisy = torch.empty_like(latents, dtype=dtype)
    target_shape = (images if velocity else pairs, channels, height, width)
    target = torch.empty(target_shape, dtype=torch.float32, device=latents.device, memory_format=layout)
    _call(
        "noise_pair",
        latents,
        latents=_images(latents, latents),
        signal=_vector(sqrt_alpha_bar, torch.float32, pairs, latents),
        sigma=_vector(sqrt_one_minus_alpha_bar, torch.float32, pairs, latents),
        seed=seed & 0xFFFFFFFFFFFFFFFF,
        pair_id=_vector(pair_id, torch.int64, pairs, latents),
        draw=_vector(draw, torch.int64, pairs, latents),
        noisy=_images(noisy, latents),
        target=target.data_ptr(),
        pairs=pairs,
        channels=channels,
        pixels=height * width,
        channels_last=layout == torch.channels_last,
        velocity=velocity,
    )
    return noisy, target


# pair_errors


def pair_errors_fwd(policy_pred: Tensor, ref: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `kernels.pair_errors` on checked arguments.

    policy_pred [2B,C,H,W]; ref: predictions [2B,C,H,W], errors float32 [2B] or None; target [B,C,H,W] or [2B,C,H,W];
    dtypes may differ. Returns policy_error, ref_error and error_delta, float32 [2B] each.
    """
    policy_error, ref_error, error_delta = (_floats(policy_pred, policy_pred.shape[0]) for _ in range(3))
    errors, _workspace = _errors(policy_pred, ref, target, policy_error, ref_error, error_delta)
    _call("pair_errors", policy_pred, errors=errors)
    return policy_error, ref_error, error_delta


def pair_errors_bwd(grad_error: Tensor, policy_pred: Tensor, target: Tensor) -> Tensor:
    """Return the gradient with respect to policy_pred, [2B,C,H,W] in its dtype.

    grad_error [2B] is the sum of the gradients of policy_error and error_delta.
    """
    grad = torch.empty_like(policy_pred)
    grad_error = grad_error.float().contiguous()
    address = _vector(grad_error, torch.float32, policy_pred.shape[0], policy_pred)
    _call("pair_errors_grad", policy_pred, errors=_errors_grad(address, policy_pred, target, grad))
    return grad


# dpo_loss


def dpo_loss_fwd(
    policy_pred: Tensor, ref: Tensor, target: Tensor, beta: float, label: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `kernels.dpo_loss` on checked arguments.

    policy_pred, ref and target are as in `pair_errors_fwd`, with ref not None; label and weight float32 [B] or None
    (all 1).
    Returns loss [], margin [B], policy_error and ref_error [2B], all float32.
    """
    images = policy_pred.shape[0]
    policy_error, ref_error = _floats(policy_pred, images), _floats(policy_pred, images)
    loss, margin = _floats(policy_pred), _floats(policy_pred, images // 2)
    errors, _workspace = _errors(policy_pred, ref, target, policy_error, ref_error, None)
    _call(
        "dpo_loss",
        policy_pred,
        errors=errors,
        beta=beta,
        label=_vector(label, torch.float32, images // 2, policy_pred),
        weight=_vector(weight, torch.float32, images // 2, policy_pred),
        loss=loss.data_ptr(),
        margin=margin.data_ptr(),
    )
    return loss, margin, policy_error, ref_error


def dpo_loss_bwd(
    grad_loss: Tensor,
    policy_pred: Tensor,
    target: Tensor,
    margin: Tensor,
    beta: float,
    label: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """Return the gradient with respect to policy_pred, [2B,C,H,W] in its dtype.

    grad_loss is float32 [], margin float32 [B] from the forward, label and weight float32 [B] or None (all 1).
    """
    grad, pairs = torch.empty_like(policy_pred), policy_pred.shape[0] // 2
    _call(
        "dpo_loss_grad",
        policy_pred,
        errors=_errors_grad(0, policy_pred, target, grad),
        grad_loss=_vector(grad_loss.view(1), torch.float32, 1, policy_pred),
        margin=_vector(margin, torch.float32, pairs, policy_pred),
        label=_vector(label, torch.float32, pairs, policy_pred),
        weight=_vector(weight, torch.float32, pairs, policy_pred),
        beta=beta,
    )
    return grad


# Prepare the extension's arguments; ValueError for what it cannot compute with.


def _call(op: str, x: Tensor, **arguments: Any) -> None:
    """Call an op of the extension on the device of x.

    The device is made current in PyTorch first: PyTorch's runtime then makes current the context that the extension's
    own, static runtime launches in. Afterwards both runtimes are back on the device they began on.
    """
    with _current(x.device):
        getattr(_native, op)(place=_place(x), **arguments)


def _current(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _place(x: Tensor) -> Any:
    """Return where to compute: a device's ordinal and its current stream, or the CPU and a number of threads."""
    device = x.device
    if device.type == "cuda":
        if fault := _cuda_fault(device.index):
            raise RuntimeError(f"backend 'native' cannot be used on {device}: {fault}")
        return _native.Place(device.index, torch.cuda.current_stream(device).cuda_stream, 0)
    if device.type != "cpu":
        raise ValueError(f"backend 'native' computes on cpu and cuda; got tensors on {device}")
    # OpenMP hangs in a forked child of a process that has used it
    threads = torch.get_num_threads() if os.getpid() == _process else 1
    return _native.Place(-1, 0, max(1, min(threads, x.numel() // _PER_THREAD)))


def _images(x: Tensor, like: Tensor) -> Any:
    """Return the address and dtype of x [N, C, H, W], which must be dense in the memory order of `like`."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"backend 'native' knows float32, float16 and bfloat16; got {x.dtype}: use 'reference'")
    if x.device != like.device:
        raise ValueError(f"backend 'native' needs all tensors on {like.device}; got one on {x.device}")
    if x.shape[1:] != like.shape[1:] or not x.is_contiguous(memory_format=memory_format(like)):
        raise ValueError(
            f"backend 'native' needs dense images in one memory order; got {list(x.shape)} with strides {x.stride()}"
            f" beside {list(like.shape)} with {like.stride()}"
        )
    return _native.Array(x.data_ptr(), _DTYPES[x.dtype])


def _vector(x: Tensor | None, dtype: torch.dtype, size: int, like: Tensor) -> int:
    """Return the address of x, which must be [size] and contiguous; 0 for None."""
    if x is None:
        return 0
    if x.dtype != dtype or x.shape != (size,) or x.device != like.device or not x.is_contiguous():
        raise ValueError(
            f"backend 'native' needs {dtype} [{size}] on {like.device}; got {x.dtype} {list(x.shape)} on {x.device}"
        )
    return x.data_ptr()


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _errors(
    policy_pred: Tensor,
    ref: Tensor | None,
    target: Tensor,
    policy_error: Tensor,
    ref_error: Tensor,
    error_delta: Tensor | None,
) -> tuple[Any, Tensor]:
    """Return the extension's PairErrors and its workspace, which has to stay alive during the call."""
    images = policy_pred.shape[0]
    elements = policy_pred.numel() // images
    sums = _floats(policy_pred, _native.pair_sums_floats(_place(policy_pred), images, elements))
    is_errors = ref is not None and ref.dim() == 1
    errors = _native.PairErrors(
        policy=_images(policy_pred, policy_pred),
        ref=_native.Array(0, 0) if ref is None or is_errors else _images(ref, policy_pred),
        ref_error=_vector(ref, torch.float32, images, policy_pred) if is_errors else 0,
        target=_images(target, policy_pred),
        pairs=images // 2,
        targets=target.shape[0],
        elements=elements,
        sums=sums.data_ptr(),
        policy_error_out=policy_error.data_ptr(),
        ref_error_out=ref_error.data_ptr(),
        error_delta_out=0 if error_delta is None else error_delta.data_ptr(),
    )
    return errors, sums


def _errors_grad(grad_error: int, policy_pred: Tensor, target: Tensor, grad: Tensor) -> Any:
    return _native.PairErrorsGrad(
        grad_error=grad_error,
        policy=_images(policy_pred, policy_pred),
        target=_images(target, policy_pred),
        pairs=policy_pred.shape[0] // 2,
        targets=target.shape[0],
        elements=policy_pred.numel() // policy_pred.shape[0],
        grad=_images(grad, policy_pred),
    )
