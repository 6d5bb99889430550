"""Profile one step with torch.profiler: launches, host waits, and time by class of operator."""

import re
import time
from dataclasses import dataclass, field

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

CLASSES = ("conv", "linear", "attention", "norm", "elementwise", "optimizer", "copies", "host")
_RANGE = "the step"

# The first pattern that matches decides. Names are of PyTorch operators and cuDNN, cuBLAS, Inductor and Triton kernels.
_PATTERNS = (
    ("optimizer", r"fused_adam|multi_tensor_apply"),
    ("attention", r"scaled_dot_product|flash|fmha|attention|softmax"),
    ("conv", r"conv|fprop|dgrad|wgrad|implicit_gemm|winograd"),
    ("linear", r"\b(mm|addmm|bmm|baddbmm|linear|mkl_linear|matmul)\b|gemm|cutlass|nvjet|splitk|xmma"),
    ("norm", r"group_norm|layer_norm|batch_norm|GroupNorm|LayerNorm|RowwiseMoments|vectorized_layer"),
    (
        "copies",
        r"copy|memcpy|memset|Memcpy|Memset|::cat$|Cat|clone|contiguous|::to$|::stack$|::pad|_to_copy|fill_|zero_",
    ),
)
_NOT_WORK = re.compile(  # views and bookkeeping: they launch nothing
    r"aten::(empty\w*|view\w*|_unsafe_view|reshape\w*|_reshape_alias|as_strided\w*|transpose|t|permute|expand\w*|select|"
    r"slice|narrow|chunk|split\w*|unbind|squeeze|unsqueeze|detach\w*|alias|flatten|unflatten|new_empty\w*|resize_|result_type|"
    r"resolve_\w+|lift_fresh|is_\w+|set_|item|swapaxes|movedim|numpy_T|unsafe_\w+|size|stride|broadcast_\w+|to|contiguous|"
    r"type_as|data_ptr|_has_\w+|can_cast|_local_scalar_dense|set_data|_nested_\w+|isfinite|linear|matmul|conv2d|convolution|"
    r"_convolution|layer_norm|group_norm|scaled_dot_product_attention|repeat|ones|zeros|full|ones_like|zeros_like)$"
)
_WAITS = re.compile(r"cuda(Stream|Device|Event)Synchronize|aten::_local_scalar_dense|aten::nonzero$")


@dataclass
class Profile:
    """The profile of one step."""

    seconds: float
    launches: int  # kernels on a GPU; operators and compiled kernels on a CPU
    host_syncs: int  # times the host waited for the device; on a CPU, would have
    classes: dict[str, float] = field(default_factory=dict)  # seconds
    top: list[tuple[str, str, float, int]] = field(default_factory=list)  # name, class, seconds, calls


def classify(name: str) -> str:
    """Return the class of an operator or kernel by its name, which for a compiled kernel lists what is fused in it."""
    for kind, pattern in _PATTERNS:
        if re.search(pattern, name):
            return kind
    return "elementwise"


def profiled(step, device: str) -> Profile:
    """Run `step` once under the profiler. device: cpu or cuda."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as recorded:
        with record_function(_RANGE):
            started = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
    events = recorded.events()
    outer = next(event for event in events if event.name == _RANGE and event.device_type == DeviceType.CPU)
    inside = [
        e
        for e in events
        if e is not outer
        and e.device_type == DeviceType.CPU
        and outer.time_range.start <= e.time_range.start <= outer.time_range.end
    ]
    result = Profile(seconds, 0, 0, dict.fromkeys(CLASSES, 0.0))
    totals: dict[tuple[str, str], list[float]] = {}

    def add(name: str, kind: str, spent: float) -> None:
        result.classes[kind] += spent
        total = totals.setdefault((name, kind), [0.0, 0])
        total[0] += spent
        total[1] += 1

    for event in inside:
        optimizer = _in_optimizer(event)
        if _WAITS.search(event.name) and not optimizer:
            result.host_syncs += 1
        if device == "cuda":
            for kernel in event.kernels:
                result.launches += 1
                add(kernel.name, "optimizer" if optimizer else classify(kernel.name), kernel.duration / 1e6)
        elif event.name.startswith(("aten::", "mkldnn::", "dpo_fast::", "onednn::")) or "_fused_" in event.name:
            result.launches += _launches(event)
            kind = "optimizer" if optimizer else classify(event.name)
            if kind != "elementwise" or not _NOT_WORK.match(event.name):  # views and the like count as host
                add(event.name, kind, event.self_cpu_time_total / 1e6)
    if device == "cuda":
        result.host_syncs -= 1  # our own synchronize above
    result.classes["host"] = max(0.0, seconds - sum(result.classes.values()))
    ranked = sorted(totals.items(), key=lambda entry: -entry[1][0])[:15]
    result.top = [(name, kind, spent, int(calls)) for (name, kind), (spent, calls) in ranked]
    return result


def _launches(event) -> bool:
    """Whether an operator on a CPU does the work itself."""
    return not _NOT_WORK.match(event.name) and not any(
        child.name.startswith(("aten::", "mkldnn::")) and not _NOT_WORK.match(child.name)
        for child in event.cpu_children
    )


def _in_optimizer(event) -> bool:
    while event is not None:
        if event.name.startswith(("Optimizer.step", "aten::_foreach_")):  # foreach operators: clipping, masters
            return True
        event = event.cpu_parent
    return False
