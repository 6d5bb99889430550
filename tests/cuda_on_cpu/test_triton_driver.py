"""The stand-in for Triton's driver: what it hands over is what the kernels would be launched with on a GPU."""

import struct
import sys
from types import ModuleType

import pytest
import torch

triton = pytest.importorskip("triton")

from dpo_fast.kernels import dpo_loss, noise_pair  # noqa: E402
from tests.cuda_on_cpu.triton_driver import PTXDriver, packed, parameter_sizes, triton_on_ptx  # noqa: E402
from tests.kernels.cases import BF16, F16, F32, Case, loss_inputs, noise_inputs  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter does not compile")


class Recorder:
    """Keeps what it is launched with; computes nothing."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __call__(self, ptx, kernel_name, grid, threads, shared_bytes, parameters) -> None:
        assert f".visible .entry {kernel_name}(" in ptx and ".target sm_90" in ptx
        assert f".reqntid {threads}" in ptx
        assert [len(parameter) for parameter in parameters] == parameter_sizes(ptx, kernel_name)
        self.launches.append((kernel_name, grid, threads, shared_bytes, parameters))


def integers(*values: int) -> list[bytes]:
    return [struct.pack("<i", value) for value in values]


def addresses(*tensors: torch.Tensor) -> list[bytes]:
    return [struct.pack("<Q", tensor.data_ptr()) for tensor in tensors]


SCRATCH = [bytes(8)] * 2  # Triton's two, of which the kernels need none


@pytest.mark.parametrize("channels_last", [False, True])
def test_noise_is_launched_once_with_its_arguments(channels_last, seed):
    """Sizes that are 1, here the groups, are compiled in; the seed takes as many bits as it needs."""
    inputs = noise_inputs(Case("noise", pairs=3, shape=(4, 16, 20), policy=F16, channels_last=channels_last), seed)
    inputs.seed = 0x89ABCDEF01234567
    recorder = Recorder()
    with triton_on_ptx(recorder):
        noisy, target = noise_pair(**vars(inputs), prediction_type="v_prediction", dtype=BF16, backend="triton")
    ((name, grid, threads, shared, parameters),) = recorder.launches
    assert name == ("noise_pixels_kernel" if channels_last else "noise_planes_kernel")
    assert grid == (6, 1, 1) and threads == 32 and shared >= 0  # 320 pixels are two rows of 256 blocks
    tensors = addresses(inputs.latents, inputs.sqrt_alpha_bar, inputs.sqrt_one_minus_alpha_bar)
    tensors += [struct.pack("<Q", inputs.seed), *addresses(inputs.pair_id, inputs.draw, noisy, target)]
    assert parameters == [*tensors, *integers(3, 4, 320, 2), *SCRATCH]


@pytest.mark.slow
def test_the_loss_is_two_launches_forward_and_one_backward(seed):
    inputs = loss_inputs(Case("loss", pairs=2, shape=(4, 24, 32), policy=BF16, ref=BF16, labels=True), seed)
    recorder = Recorder()
    with triton_on_ptx(recorder):
        result = dpo_loss(inputs.policy_pred, inputs.ref, inputs.target, 5000.0, label=inputs.label, backend="triton")
        forward = [launch[0] for launch in recorder.launches]
        result.loss.backward()
    assert forward == ["tile_sums_kernel", "dpo_loss_kernel"]
    sums, loss, gradient = recorder.launches
    assert gradient[0] == "dpo_loss_bwd_kernel"
    assert [launch[1:3] for launch in recorder.launches] == [((4, 1, 1), 128), ((1, 1, 1), 128), ((4, 1, 1), 128)]
    assert sums[3] > 0  # its warps add up in shared memory
    workspace = sums[4][3]
    images = addresses(inputs.policy_pred, inputs.ref, inputs.target)
    assert sums[4] == [*images, workspace, *integers(2, 3072, 2), *SCRATCH]
    outputs = addresses(inputs.label, result.loss, result.margin, result.policy_error, result.ref_error)
    half_beta = [struct.pack("<f", 2500.0)]
    assert loss[4] == [workspace, *outputs, *half_beta, *integers(2, 3072, 2), *SCRATCH]  # no cached error, no weight
    _, policy, target, margin, label, grad = gradient[4][:6]
    assert [policy, target, margin, label] == addresses(inputs.policy_pred, inputs.target, result.margin, inputs.label)
    assert grad != policy
    floats = [struct.pack("<f", 1250.0), struct.pack("<f", 2 / 3072)]
    assert gradient[4][6:] == [*floats, *integers(2, 3072, 2), *SCRATCH]


def test_all_is_as_before_afterwards_even_when_a_launch_fails(monkeypatch, seed):
    def fail(*arguments) -> None:
        raise ArithmeticError("a launch")

    inputs = noise_inputs(Case("noise"), seed)
    options = dict(prediction_type="epsilon", dtype=F32, backend="triton")
    monkeypatch.setitem(sys.modules, "dpo_fast.kernels.triton.kept", ModuleType("kept"))  # as if imported before
    before = {name: module for name, module in sys.modules.items() if name.startswith("dpo_fast.kernels.triton")}
    driver = triton.runtime.driver._active
    with pytest.raises(ArithmeticError, match="a launch"), triton_on_ptx(fail):
        noise_pair(**vars(inputs), **options)
    after = {name: module for name, module in sys.modules.items() if name.startswith("dpo_fast.kernels.triton")}
    assert after == before
    assert triton.runtime.driver._active is driver
    assert PTXDriver.keep_ptx not in triton.knobs.runtime.kernel_load_end_hook.calls
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="'triton' cannot be used here"):
            noise_pair(**vars(inputs), **options)


def test_float64_is_refused_as_on_a_gpu(seed):
    inputs = noise_inputs(Case("noise"), seed)
    with triton_on_ptx(Recorder()), pytest.raises(ValueError, match="does not compute in float64"):
        noise_pair(**vars(inputs), prediction_type="epsilon", dtype=torch.float64, backend="triton")


def test_arguments_are_packed_as_the_kernel_reads_them():
    x = torch.zeros(3)
    assert packed("*fp32", x[1:]) == struct.pack("<Q", x.data_ptr() + 4)
    assert packed("i32", -2) == b"\xfe\xff\xff\xff" and packed("i64", 1 << 40) == struct.pack("<q", 1 << 40)
    assert packed("u64", (1 << 64) - 1) == b"\xff" * 8
    assert packed("fp32", 0.1) == torch.tensor([0.1]).numpy().tobytes()
    with pytest.raises(ValueError, match="type fp16 is not supported"):
        packed("fp16", 1.0)
    with pytest.raises(ValueError, match="no entry other"):
        parameter_sizes(".visible .entry kernel(\n.param .u64 .ptr .global kernel_param_0\n)", "other")
    entry = ".entry k(\n.param .u64 .ptr .global .align 1 a,\n.param .b32 b,\n.param .f32 c)"
    assert parameter_sizes(entry, "k") == [8, 4, 4]
