"""The step benchmark's rows are the same work, its proof can fail, and its report says what was measured."""

import ast
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import benchmarks.step
from benchmarks.step import counts, memory, report
from benchmarks.step.cases import CASES, PROPORTION_TOLERANCE
from benchmarks.step.ours import Ours, OursCached
from benchmarks.step.peer_diffusers import PeerDiffusers
from benchmarks.step.peer_salesforce import PeerSalesforce
from benchmarks.step.prepare import prepare
from benchmarks.step.profiling import CLASSES, Profile, classify, profiled
from benchmarks.step.proof import Proof, problems, prove, weakness
from benchmarks.step.truth import Truth
from benchmarks.step.tuned import Tuned
from benchmarks.step.work import PROOF_STEPS, Settings, Work, decoded
from benchmarks.step.worker import Failed
from benchmarks.step_time import executed, main
from dpo_fast.command_line import parse
from dpo_fast.data.images import scaled, to_pixels
from dpo_fast.training.costs import memory_by_part, unet_size
from tests.benchmarks import tiny

FOLDER = Path(benchmarks.step.__file__).parent
PLAIN = ("cases", "peer_diffusers", "peer_salesforce", "plain", "proof", "truth", "tuned", "work")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folders of the tiny cases, by (family, tuning), each prepared once."""
    folders, patch = {}, pytest.MonkeyPatch()

    def get(family: str, tuning: str) -> Path:
        if (family, tuning) not in folders:
            case = tiny.case(family, tuning)
            patch.setitem(CASES, case.name, case)
            folder = tmp_path_factory.mktemp(case.name)
            prepare(folder, Settings(case.name, "cpu", "fp32", 2, PROOF_STEPS + 3, case.learning_rate, compiled=False))
            folders[family, tuning] = folder
        return folders[family, tuning]

    yield get
    patch.undo()


def ours(folder: Path, kind: type[Ours] = Ours) -> Ours:
    """Ours in eager mode, in an output folder that nothing has used."""
    return kind(folder, f"ours-{time.monotonic_ns()}")


CASES_OF = [("sd15", "lora"), ("sdxl", "lora"), ("sd15", "full"), ("sdxl", "full")]


@pytest.mark.drawn(1)
@pytest.mark.parametrize(("family", "tuning"), CASES_OF)
def test_ours_and_the_peer_do_the_work_of_the_truth(prepared, family, tuning):
    folder = prepared(family, tuning)
    peer = PeerDiffusers if tuning == "lora" else PeerSalesforce
    truth = prove(Truth(folder, "adamw"))
    assert weakness(truth) is None
    mine = prove(ours(folder))
    assert problems(mine, truth, "fp32") == []
    adafactor = peer is PeerSalesforce and family == "sdxl"
    assert problems(prove(peer(folder)), prove(Truth(folder, "adafactor")) if adafactor else truth, "fp32") == []
    assert mine.policy_error == mine.ref_error  # exactly, before the first update
    assert problems(prove(ours(folder, OursCached)), truth, "fp32") == []


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_tuned_does_the_work_of_the_truth(prepared, tuning):
    """Uncompiled, for time's sake; compiled, every run of the benchmark proves it."""
    folder = prepared("sdxl", tuning)
    assert problems(prove(Tuned(folder)), prove(Truth(folder, "adamw")), "fp32") == []


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda peer: peer.optimizer.param_groups[0].update(lr=0.9 * peer.settings.learning_rate), "step 6"),
        (lambda peer: peer.unet_.conv_in.bias.data.add_(0.02), "MSE"),
        (lambda peer: peer.trained.pop(), "gradient norm"),
        (lambda peer: peer.work.tensors["timesteps"][2].zero_(), "step 6"),
    ],
    ids=["learning rate", "weights", "a parameter", "a timestep"],
)
def test_other_work_is_found_out(prepared, spoil, named):
    folder = prepared("sd15", "lora")
    peer = PeerDiffusers(folder)
    spoil(peer)
    found = problems(prove(peer), prove(Truth(folder, "adamw")), "fp32")
    assert any(named in line for line in found), found


def test_small_margins_prove_nothing(prepared):
    truth = prove(Truth(prepared("sd15", "lora"), "adamw"))
    assert "raise" in weakness(replace(truth, margin=[0.01 for _ in truth.margin]))


def test_the_peers_encode_what_is_injected(prepared):
    """They pay for encodings of the very images and captions that the injected tensors are of."""
    for peer in (PeerDiffusers(prepared("sdxl", "lora")), PeerSalesforce(prepared("sd15", "full"))):
        peer.step()
        given = peer.work.step(0)
        embeds = given["prompt_embeds"][-len(peer.encoded[2]) :]  # of the last forward pass
        torch.testing.assert_close(peer.encoded[2], embeds.float(), atol=5e-3, rtol=2e-3)
        assert peer.encoded[0].shape[1:] == given["latents"].shape[1:]


def test_the_peers_decode_as_we_do(prepared):
    work = Work(prepared("sd15", "lora"))
    for encoded in work.images(3):
        image, _ = scaled(encoded, 64)
        torch.testing.assert_close(decoded(encoded, 64), to_pixels(image, 0, 0, 64) / 127.5 - 1, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_import_nothing_of_dpo_fast(name):
    imported = set()
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert not [module for module in imported if module.split(".")[0] in ("dpo_fast", "tests")]
    ours = {module.split(".")[2] for module in imported if module.startswith("benchmarks.")}
    assert ours <= set(PLAIN), "what they import of the benchmarks must be plain too"


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].mini])
def test_minis_keep_the_proportions(name):
    mini, real = counts.known(name), counts.known(name.removeprefix("mini-"))
    for encoder, share in (("vae_flops", 2), ("text_flops", 1)):
        of_mini, of_real = (share * c[encoder] / c["flops"] for c in (mini, real))
        assert of_mini == pytest.approx(of_real, rel=PROPORTION_TOLERANCE), encoder
    assert mini["ref_flops"] / mini["flops"] == pytest.approx(real["ref_flops"] / real["flops"], rel=0.1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mkldnn_convolution", "conv"),
        ("aten::convolution_backward", "conv"),
        ("aten::addmm", "linear"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::native_group_norm_backward", "norm"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::copy_", "copies"),
        ("aten::mul", "elementwise"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "conv"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_TNT", "linear"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
    ],
)
def test_classes_of_operators(name, kind):
    assert classify(name) == kind


def test_a_profile_accounts_for_the_step():
    convolution, linear = torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.Linear(64, 64)
    pixels, rows = torch.randn(2, 16, 64, 64), torch.randn(512, 64)

    def step():
        (convolution(pixels).square().sum() + linear(rows).sum()).backward()
        torch.ones(()).item()

    step()
    profile = profiled(step, "cpu")
    assert sum(profile.classes.values()) == pytest.approx(profile.seconds, rel=0.05)
    assert profile.classes["conv"] > profile.classes["attention"] == 0
    assert profile.classes["linear"] > 0
    assert profile.host_syncs == 1
    assert 8 <= profile.launches <= 40


@pytest.mark.exhaustive
def test_report_of_real_rows(prepared, tmp_path):
    folder = prepared("sd15", "lora")
    case = tiny.case("sd15", "lora")
    needed = dict(flops=4e9, forward_flops=1e9, vae_flops=3e8, text_flops=2e8)
    truth = prove(Truth(folder, "adamw"))
    rows = []
    for name, provider in (("ours", ours(folder)), ("peer-diffusers", PeerDiffusers(folder))):
        proof = prove(provider)
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            provider.step()
            seconds.append(time.perf_counter() - started)
        wrong = problems(replace(proof, grad_norm=2 * proof.grad_norm), truth, "fp32") if name != "ours" else []
        profile = profiled(provider.step, "cpu")
        flops = executed(name, case, needed)
        rows.append(report.Row(name, 2, seconds, [0.0, 1e-4], flops, 2**30, proof, profile, 1.0, 2.0, wrong))
    result = report.Result(
        case.name, "a machine", {"torch": torch.__version__}, "the command", "fp32", 2, 0.1, 4e9, {"adamw": truth}, rows
    )
    assert result.floor_ms == pytest.approx(40)
    assert rows[1].flops == 4e9 + 1e9 + 2 * 3e8 + 2e8
    text = report.table(result)
    assert f"{1e3 / rows[0].ms[0]:9.3g}".strip() in text and "floor 40 ms" in text
    assert "peer-diffusers did other work: gradient norm" in text and text.count("DIFFERS") == 1
    assert all(name in report.profile_table(result) for name in CLASSES)

    value = json.loads(json.dumps(report.as_json(result)))
    there = value["rows"][0]["times_as_fast_as"]["peer-diffusers"]
    assert there == pytest.approx(rows[1].ms[0] / rows[0].ms[0])
    assert value["rows"][1]["problems"] and value["floor_ms"] == pytest.approx(40)

    report.plot([result], tmp_path / "plot.png")
    picture = Image.open(tmp_path / "plot.png").convert("RGB")
    report.plot([result, result], tmp_path / "two.png")
    assert Image.open(tmp_path / "two.png").height == 2 * picture.height
    colours = {colour for _, colour in picture.getcolors(maxcolors=1 << 20)}
    assert {(0x2A, 0x6F, 0xBB), (0xB0, 0xB7, 0xBF), (0xC0, 0x39, 0x2B)} <= colours  # ours, the peer, the floor


@pytest.mark.exhaustive
def test_the_command(tmp_path, monkeypatch, capsys):
    """One provider of a mini case, in processes of its own: exit status, JSON and picture."""
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    command = ["step_time.py", "--case", "mini-sd15-512-lora", "--providers", "peer-diffusers", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--device", "cpu", *files])
    monkeypatch.setattr("benchmarks.step_time.WARM_UP", 0)
    assert main() == 0
    assert "equal" in capsys.readouterr().out
    [row] = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["problems"] == [] and len(row["seconds"]) == 2 and row["profile"]["launches"] > 3000
    assert row["peak_memory"] > 2**28 and row["profile"]["host_syncs"] >= 4
    assert Image.open(tmp_path / "out.png").width == 1000


def run_command(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["step_time.py", *words])
    return main()


def row_of(name: str, milliseconds: float) -> report.Row:
    """A provider's row of made-up numbers, doing the work of the truth below."""
    profile = Profile(milliseconds / 1e3, 100, 0, dict.fromkeys(CLASSES, 0.0))
    return report.Row(name, 1, [milliseconds / 1e3], [0.0], 1e9, 2**30, PROOF, profile, 1.0, 2.0, [])


PROOF = Proof([1.0, 1.0], [1.0, 1.0], 0.5, [3.0, -3.0])


@pytest.fixture
def quick_cases(monkeypatch):
    """Every case takes no time: two providers, of which the second fails where the case is in the set that is given."""
    failing: set[str] = set()

    def measured(case, arguments, note):
        versions, truth = {"torch": torch.__version__}, {"adamw": PROOF}
        result = report.Result(case.name, "a machine", versions, "command", "fp32", 1, 0.1, 4e9, truth, [])
        result.unmeasured = ["ours", "tuned"]
        for name in ("ours", "tuned"):
            if name == "tuned" and case.name in failing:
                raise Failed("tuned: out of memory")
            result.rows.append(row_of(name, 8.0))
            result.unmeasured.remove(name)
            note(result)
        return result

    monkeypatch.setattr("benchmarks.step_time.measured_case", measured)
    return failing


def test_without_a_case_a_cpu_measures_the_minis(quick_cases, monkeypatch, tmp_path, capsys):
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert run_command(monkeypatch, "--device", "cpu", *files) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    minis = [name for name in CASES if CASES[name].mini]
    assert list(written["cases"]) == minis and written["left_out"] == {}
    assert all(name in capsys.readouterr().out for name in minis[:1])
    one = report.picture(report.Result("x", "y", {}, "c", "fp32", 1, 0.1, 4e9, {}, [row_of("a", 1), row_of("b", 1)]))
    assert Image.open(tmp_path / "out.png").height == len(minis) * one.height


@pytest.mark.parametrize("words", [("--case", "mini-sd15-512-lora", "mini-sd15-512-full"), None])
def test_several_cases_and_one_that_fails(quick_cases, monkeypatch, tmp_path, words):
    """The providers measured before the failure are in the file, and the next case is still measured."""
    quick_cases.add("mini-sd15-512-lora")
    words = words or ("--case", "mini-sd15-512-lora", "--case", "mini-sd15-512-full")
    assert run_command(monkeypatch, "--device", "cpu", *words, "--json", str(tmp_path / "out.json")) == 1
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    failed, complete = cases["mini-sd15-512-lora"], cases["mini-sd15-512-full"]
    assert failed["failed"] == "tuned: out of memory" and failed["unmeasured"] == ["tuned"]
    assert [row["provider"] for row in failed["rows"]] == ["ours"]
    assert [row["provider"] for row in complete["rows"]] == ["ours", "tuned"] and complete["unmeasured"] == []


def test_one_case_keeps_its_format(quick_cases, monkeypatch, tmp_path):
    path = str(tmp_path / "out.json")
    assert run_command(monkeypatch, "--device", "cpu", "--case", "mini-sd15-512-lora", "--json", path) == 0
    assert [row["provider"] for row in json.loads(Path(path).read_text())["rows"]] == ["ours", "tuned"]


def test_a_gpu_measures_what_its_memory_holds(quick_cases, monkeypatch, tmp_path, capsys):
    """Of the default cases those that fit, by the free memory; the others are named with what they need."""
    sizes = {"sdxl-1024-lora": 50, "turbo-512-lora": 20, "sdxl-1024-full": 90, "turbo-512-full": 60}
    monkeypatch.setattr(memory, "needed_bytes", lambda case, dtype, batch_size: sizes[case.name] * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * 2**30, 80 * 2**30))
    assert run_command(monkeypatch, "--device", "cuda", "--json", str(tmp_path / "out.json")) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written["cases"]) == ["sdxl-1024-lora", "turbo-512-lora", "turbo-512-full"]
    reason = "needs 90.0 GiB, 60.0 GiB are free"
    assert written["left_out"] == {"sdxl-1024-full": reason}
    assert f"sdxl-1024-full is left out: {reason}" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * 2**30, 80 * 2**30))
    assert run_command(monkeypatch, "--device", "cuda") == 1


def test_the_predicted_memory_is_that_of_the_dry_run():
    """Ours as `--dry-run` has it; of LoRA the truth holds a second UNet in fp32."""
    lora, full = tiny.case("sd15", "lora"), tiny.case("sd15", "full")
    flags = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--mixed_precision", "bf16"]
    config, _ = parse([*flags, "--tuning", "full", "--train_batch_size", "64", "--pairs_per_step", "64"])
    size = unet_size({"in_channels": 4, **full.model.unet}, config, full.latent_side)
    many = replace(full, pairs=64)
    assert memory.needed_bytes(many, "bf16", 64) == sum(memory_by_part(size, config).values())
    assert memory.needed_bytes(lora, "bf16", 1) > 2 * 4 * size.parameters


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--providers", "peer-salesforce"], "--providers peer-salesforce does not train mini-sd15-512-lora"),
        (["--batch_size", "3"], "--batch_size (3) must divide the 4 pairs of a step"),
        (["--steps", "0"], "--steps (0) must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["step_time.py", "--case", "mini-sd15-512-lora", *words])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2 and message in capsys.readouterr().err
