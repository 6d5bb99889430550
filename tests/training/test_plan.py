"""`--dry-run`: what it says of pairs, cache, memory, disk and time is so, and it writes nothing."""

import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import yaml

from dpo_fast.train import main
from dpo_fast.training import memory_fit, plan, run_folder, timing
from tests.helpers.pairs import pickapic, write_pickapic, write_table
from tests.helpers.runs import STEPS, flags_for, train


def lines(text: str, about: str) -> dict[str, str]:
    """The plan's lines on a subject: what the figure counts -> figure."""
    return {m[2]: m[1] for m in re.finditer(rf"^{about} +(\S+(?: [MG]iB| minutes| s)?)  (.*)$", text, re.MULTILINE)}


def figure(text: str, about: str, what: str) -> str:
    """The figure of the one line on a subject that contains some words."""
    (found,) = (figure for counted, figure in lines(text, about).items() if what in counted)
    return found


@pytest.fixture
def planned(tmp_path, capsys, monkeypatch):
    """Dry-run a command line, with nothing but a cache folder of its own, and return what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()

    def run(*arguments: object, status: int = 0) -> str:
        before = everything(tmp_path)
        capsys.readouterr()
        assert main(flags_for(*arguments)) == status
        assert everything(tmp_path) == before, "it wrote something"
        shown = capsys.readouterr()
        return shown.out if status == 0 else shown.err

    return run


def everything(folder: Path) -> dict[Path, tuple[int, int] | None]:
    """Every file with size and time of change, and every folder."""
    states = {path: path.stat() for path in folder.rglob("*")}
    return {path: None if path.is_dir() else (of.st_size, of.st_mtime_ns) for path, of in states.items()}


# ---- pairs -----------------------------------------------------------------------------------------------------------


def faulty_pairs(path: Path) -> Path:
    """14 rows: two ties, an empty caption, an image that is cut off, and two captions that recur."""
    columns = pickapic(n=14)
    columns["label_0"][2] = columns["label_0"][7] = 0.5
    columns["caption"][4] = ""
    columns["jpg_1"][9] = columns["jpg_1"][9][:100]
    columns["caption"][11] = columns["caption"][12] = columns["caption"][13]
    return write_table(path, columns)


@pytest.mark.parametrize("word", ["--dry-run", "--dry_run"])
def test_what_becomes_of_the_rows(sd15_path, tmp_path, planned, word):
    data = faulty_pairs(tmp_path / "pairs.parquet")
    more = ["--max_bad_fraction", 0.5, "--output_dir", tmp_path / "out", word]
    text = planned(sd15_path, data, tmp_path / "out", *more)
    counts = lines(text, "pairs")
    assert (counts["to train on"], counts["ties dropped"], counts["different captions"]) == ("10", "2", "8")
    assert figure(text, "pairs", "rows in pairs.parquet") == "14"
    assert figure(text, "pairs", "bad: row 4: caption is empty; row 9: jpg_1 cannot be decoded") == "2"
    assert figure(text, "visits", f"in {STEPS} steps: 0.80 passes over the pairs") == str(2 * STEPS)
    configuration = yaml.safe_load(text.split("\n\n")[0])
    assert (configuration["pairs_per_step"], configuration["beta_dpo"], configuration["resolution"]) == (2, 5000.0, 64)


def test_pairs_that_are_held_out(sd15_path, pairs, tmp_path, planned):
    more = ["--run_validation", "--validation_fraction", 0.3, "--dry-run"]
    text = planned(sd15_path, pairs, tmp_path / "out", *more)
    held_out = int(figure(text, "pairs", "held out"))
    assert 0 < held_out < 12 and int(figure(text, "pairs", "to train on")) == 12 - held_out
    assert f"warning: --validation_fraction 0.3 holds out {held_out} pairs" in text


def test_the_steps_of_epochs_are_counted(sd15_path, pairs, tmp_path, planned):
    more = ["--max_train_steps", "None", "--num_train_epochs", 3, "--dry-run"]
    text = planned(sd15_path, pairs, tmp_path / "out", *more)
    assert figure(text, "visits", "in 18 steps: 3.00 passes") == "36"


def test_a_stream_says_what_it_cannot_say(sd15_path, pairs, tmp_path, planned):
    text = planned(sd15_path, pairs, tmp_path / "out", "--streaming", "--dry-run")
    assert figure(text, "pairs", "rows in pairs.parquet, split train, streamed") == "12"
    assert figure(text, "pairs", "ties, bad rows and captions") == "unknown"
    assert figure(text, "visits", f"in {STEPS} steps: at least 0.67 passes") == "8"
    assert figure(text, "cache", "to be added at most: 24 latents, 12 embeddings")


class Builder(SimpleNamespace):
    """What `datasets` says of a set on the hub."""

    def __init__(self, folder: Path) -> None:
        splits = {"train": SimpleNamespace(num_examples=850_000), "test": SimpleNamespace(num_examples=500)}
        info = SimpleNamespace(splits=splits, download_size=300 * 2**30, dataset_size=310 * 2**30)
        super().__init__(cache_dir=str(folder), info=info)


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """A set that the hub has and this machine has not; whatever would download it fails the test."""
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: Builder(tmp_path / "prepared"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("it downloads"))
    return "owner/pairs"


@pytest.mark.parametrize("word", [["--dry-run"], ["--dry-run", "timed"]])
def test_a_set_that_is_not_on_this_machine_is_not_downloaded(sd15_path, tmp_path, planned, on_the_hub, word):
    text = planned(sd15_path, on_the_hub, tmp_path / "out", *word)
    counts = lines(text, "pairs")
    assert counts["rows in owner/pairs on the hub, which a run downloads first"] == "850,000"
    assert counts["to download"] == "300.00 GiB" and counts["on this disk once it is unpacked"] == "310.00 GiB"
    assert figure(text, "pairs", "ties, bad rows, captions and passes") == "unknown"
    why = "the pairs are not on this machine yet" if word[1:] else "--dry-run timed takes a few steps"
    assert figure(text, "time", f"not timed: {why}") == "unknown"


def test_a_split_that_the_hub_does_not_have_is_refused(sd15_path, tmp_path, planned, on_the_hub):
    said = planned(sd15_path, on_the_hub, tmp_path / "out", "--dataset_split_name", "best", "--dry-run", status=2)
    assert "data set 'owner/pairs' has no split 'best'" in said and "train, test" in said


def test_offline_a_set_of_the_hub_is_refused_with_a_remedy(sd15_path, tmp_path, planned):
    said = planned(sd15_path, "owner/pairs", tmp_path / "out", "--dry-run", status=2)
    assert (
        "data set 'owner/pairs' cannot be opened" in said and "name a local file or folder with --dataset_name" in said
    )


# ---- cache, memory, disk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flips", [[], ["--hflip"]], ids=["plain", "hflip"])
def test_what_the_cache_holds_already(sd15_path, tmp_path, planned, flips):
    columns = pickapic(n=6)
    columns["jpg_1"][3] = columns["jpg_0"][0]  # 11 different images
    data, cache = write_table(tmp_path / "pairs.parquet", columns), tmp_path / "cache"
    every = ["--latent_cache_dir", cache, "--train_batch_size", 6, *flips]
    latents = 11 * (1 + len(flips))
    text = planned(sd15_path, data, tmp_path / "out", *every, "--dry-run")
    assert figure(text, "cache", "different images in 6 pairs") == "11"
    assert figure(text, "cache", f"of {latents} latents are there") == "0"
    added = f"to be added at most: {latents} latents, 6 embeddings"
    assert figure(text, "cache", added) != "0.0 MiB" or added in text
    train(sd15_path, data, tmp_path / "first", *every)
    text = planned(sd15_path, data, tmp_path / "out", *every, "--dry-run")
    assert figure(text, "cache", f"of {latents} latents are there") == str(latents)
    assert figure(text, "cache", "of 6 embeddings are there") == "6"
    assert figure(text, "cache", "to be added at most: 0 latents, 0 embeddings") == "0.0 MiB"
    text = planned(sd15_path, data, tmp_path / "out", *every, "--resolution", 32, "--dry-run")
    assert figure(text, "cache", f"of {latents} latents are there") == "0"


def test_images_that_were_never_hashed_count_as_different(sd15_path, pairs, tmp_path, planned, monkeypatch):
    from dpo_fast.data.pairs import build_index

    monkeypatch.setitem(build_index.__kwdefaults__, "check_pairs", 3)  # of a large set few are looked at
    more = ["--latent_cache_dir", tmp_path / "cache", "--train_batch_size", 12, "--dry-run"]
    text = planned(sd15_path, pairs, tmp_path / "out", *more)
    assert figure(text, "cache", "different images in 3 pairs; those of 9 more are not known yet") == "6"
    assert "to be added at most: 24 latents, 12 embeddings" in text


def test_without_a_cache_nothing_is_kept(sd15_path, pairs, tmp_path, planned):
    text = planned(sd15_path, pairs, tmp_path / "out", "--no-cache", "--dry-run")
    assert lines(text, "cache") == {"images and captions are encoded at every visit": "none"}
    assert lines(text, "memory")["VAE and text encoders"]


@pytest.mark.parametrize(("share", "verdict"), [(0.5, "too"), (1.1, "tight"), (2, "fits")])
def test_memory_against_the_device(sd15_path, pairs, tmp_path, planned, monkeypatch, share, verdict):
    flags = ["--tuning", "full", "--resolution", 256]
    total = lines(planned(sd15_path, pairs, tmp_path / "out", *flags, "--dry-run"), "memory")["in all"]
    needed = float(total.split()[0]) * 2**20
    monkeypatch.setattr(memory_fit, "memory_of", lambda _: (share * needed, 4 * needed))
    text = planned(sd15_path, pairs, tmp_path / "out", *flags, "--dry-run", "timed" if verdict == "too" else "plan")
    line = next(line for line in text.splitlines() if line.startswith("memory") and " are free on " in line)
    assert line.split()[1] == verdict and f"of {4 * needed / 2**20:.1f} MiB are free on" in line
    assert ("warning: the run needs" in text, "warning: memory is tight" in text) == (
        verdict == "too",
        verdict == "tight",
    )
    if verdict == "too":
        assert re.search(r"^warning: the run needs .+; --\w+ .+ needs [\d.]+ MiB$", text, re.MULTILINE), text
        assert figure(text, "time", "not timed: it does not fit into the memory") == "unknown"


def test_the_disk_and_the_flops(sd15_path, pairs, tmp_path, planned, monkeypatch):
    monkeypatch.setattr(plan, "free_bytes", lambda folder: {"out": 7, "cache": 5}[Path(folder).name] * 2**30)
    flags = ["--tuning", "full", "--resolution", 512, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    flags += ["--gradient_accumulation_steps", 32, "--latent_cache_dir", tmp_path / "cache"]
    texts = {}
    for more in ([], ["--objective", "sft"], ["--gradient_checkpointing"]):
        texts[" ".join(more)] = planned(sd15_path, pairs, tmp_path / "out", *flags, *more, "--dry-run")
    disk = lines(texts[""], "disk")
    checkpoint, result = (float(disk[name].split()[0]) for name in ("a checkpoint", "the result"))
    whole = float(disk["in all; checkpoints: 3, at most 2 kept, and one in the making"].split()[0])
    assert whole == pytest.approx(3 * checkpoint + result, abs=0.3) and checkpoint > 0 and result > 0
    assert figure(texts[""], "disk", f"free at {tmp_path / 'out'}, on the disk of the cache") == "7.00 GiB"
    assert figure(texts[""], "cache", "free at") == "5.00 GiB"
    flops = {name: float(figure(text, "step", "TFLOP in the UNet")) for name, text in texts.items()}
    assert flops["--objective sft"] < flops[""] < flops["--gradient_checkpointing"]
    assert [name for name, text in texts.items() if "reference forward" in text] == ["", "--gradient_checkpointing"]
    assert [name for name, text in texts.items() if "recomputation" in text] == ["--gradient_checkpointing"]


def test_a_disk_that_holds_no_checkpoint_is_refused(sd15_path, pairs, tmp_path, planned, monkeypatch):
    monkeypatch.setattr(run_folder, "free_bytes", lambda _: 1000)
    said = planned(sd15_path, pairs, tmp_path / "out", "--dry-run", status=2)
    assert "has 0.0 MiB free, but one checkpoint and the result need" in said


# ---- resuming --------------------------------------------------------------------------------------------------------


def test_a_run_that_is_resumed(sd15_path, pairs, tmp_path, planned):
    out = train(sd15_path, pairs, tmp_path / "out")
    resume = [*("--resume_from_checkpoint", "auto"), "--dry-run"]
    planned(sd15_path, pairs, out, *resume)  # done: a line on stderr
    assert "in 8 steps" in planned(sd15_path, pairs, out, *resume, "--max_train_steps", 8)
    said = planned(sd15_path, pairs, out, *resume, "--beta_dpo", 3, "--max_train_steps", 8, status=2)
    assert "other settings (beta_dpo: 5000.0 -> 3.0)" in said
    other = write_pickapic(tmp_path / "other.parquet", n=9)
    said = planned(sd15_path, other, out, *resume, "--max_train_steps", 8, status=2)
    assert "other settings (pairs:" in said
    assert "is not empty" in planned(sd15_path, pairs, out, "--dry-run", status=2)
    planned(sd15_path, pairs, out, "--overwrite", "--dry-run")


def test_one_that_is_done_says_so(sd15_path, pairs, tmp_path, capsys):
    out = train(sd15_path, pairs, tmp_path / "out")
    assert main(flags_for(sd15_path, pairs, out, "--resume_from_checkpoint", "auto", "--dry-run")) == 0
    shown = capsys.readouterr()
    assert "is done already, all 4 steps" in shown.err and shown.out == ""


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--tuning", "full", "--use_ema", "--gradient_accumulation_steps", 3],
        ["--no-cache", "--run_validation"],
        ["--streaming", "--objective", "kto"],
        pytest.param(["--cached_reference", 2, "--hflip"], marks=pytest.mark.exhaustive),
        pytest.param(["--dataloader_num_workers", 2, "--no-cache"], marks=pytest.mark.exhaustive),
        pytest.param(["--init_lora", "LORA"], marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_steps_are_timed_and_nothing_of_them_is_left(sd15_path, pairs, tmp_path, planned, monkeypatch, flags):
    if "LORA" in flags:
        flags = ["--init_lora", train(sd15_path, pairs, tmp_path / "lora") / "pytorch_lora_weights.safetensors"]
    monkeypatch.setattr(timing, "MOST_ROUNDS", 3)
    text = planned(sd15_path, pairs, tmp_path / "out", *flags, "--max_train_steps", 1000, "--dry-run", "timed")
    ms = next(re.match(r"time +([\d.,]+)  ms a pair, the median of 3 steps \(([\d.,]+) to ([\d.,]+)\)", line)
              for line in text.splitlines() if " ms a pair" in line)  # fmt: skip
    middle, least, most = (float(value.replace(",", "")) for value in ms.groups())
    assert 0 < least <= middle <= most
    assert float(figure(text, "time", "pairs a second").replace(",", "")) == pytest.approx(1e3 / middle, rel=0.01)
    seconds = 1000 * 2 * (3 if 3 in flags else 1) * middle / 1e3
    shown = figure(text, "time", "for 1,000 steps (")
    assert float(shown.split()[0]) * {"s": 1, "minutes": 60}[shown.split()[1]] == pytest.approx(seconds, rel=0.3)
    assert ("to encode" in text) == ("--no-cache" not in flags)
    assert float(figure(text, "memory", "measured: the peak of the process").split()[0]) > 0.1


def test_timing_refuses_what_only_the_weights_show(sd15_path, pairs, tmp_path, planned):
    from tests.runs.test_bad_input import model_with, spoil_unet

    model = model_with(sd15_path, tmp_path, spoil_unet)
    planned(model, pairs, tmp_path / "out", "--dry-run")
    said = planned(model, pairs, tmp_path / "out", "--dry-run", "timed", status=2)
    assert "1 tensors of the UNet are not finite" in said


class Steps:
    """A trainer whose steps take 0.5 s, and 0.1 s a pass."""

    def __init__(self, slower: float = 1.0) -> None:
        self.slower, self.passes = slower, []

    def seconds(self, passes: int) -> float:
        self.passes.append(passes)
        return self.slower * (0.5 + 0.1 * passes)


@pytest.mark.parametrize(
    ("passes", "slower", "taken", "lengths", "expected"),
    [
        (1, 1.0, 1 + 10, (1,), 0.6),  # one to warm up
        (4, 1.0, 2 + 10, (4,), 0.9),
        (512, 1.0, 2 + 20, (1, 4), 51.7),  # exactly the update and 512 passes
        (512, 100.0, 1 + 10, (1,), 512 * 60.0),  # slow: one pass and its update, 512 times
    ],
)
def test_how_a_step_of_many_passes_is_timed(monkeypatch, passes, slower, taken, lengths, expected):
    trainer, ranks = Steps(slower), SimpleNamespace(is_main=False, share=lambda value: value)
    monkeypatch.setattr(timing, "_seconds", Steps.seconds)
    steps, found = timing._steps(trainer, SimpleNamespace(gradient_accumulation_steps=passes), ranks)
    assert found == lengths and len(trainer.passes) == taken
    assert steps == pytest.approx([expected] * 10)
    of = timing.Timing(steps, 8, found, passes, None, None, 1.0, "GPU", "")
    assert of.pair() == pytest.approx((expected / 8,) * 3) and of.at_most == (slower > 1)


def test_timing_ends(monkeypatch):
    """After a minute two rounds are enough."""
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(timing, "_seconds", Steps.seconds)
    ranks = SimpleNamespace(is_main=False, share=lambda value: value)
    steps, _ = timing._steps(Steps(), SimpleNamespace(gradient_accumulation_steps=2), ranks)
    assert len(steps) == 2


def test_what_is_timed_computes_as_what_was_proven_does(sd15_path, pairs, tmp_path, monkeypatch, capsys):
    """A known outcome is used; an unknown one is not asked for."""
    from dpo_fast.choices import choose
    from dpo_fast.choices.trial import Evidence

    monkeypatch.setattr(timing, "MOST_ROUNDS", 2)
    monkeypatch.setattr(choose, "judge", lambda *_: pytest.fail("it proves"))
    seen = []
    trainer = timing.Trainer

    def made(run, argv):
        seen.append(run.config.memory_order)
        return trainer(run, argv)

    monkeypatch.setattr(timing, "Trainer", made)
    flags = flags_for(sd15_path, pairs, tmp_path / "out", "--max_train_steps", 10**7, "--dry-run", "timed")
    assert main(flags) == 0 and "memory order auto, compile off" in capsys.readouterr().out

    def known(root, about):
        if about["plan"].endswith("unet") and len(about["candidates"]) == 1:
            names = (about["baseline"], *about["candidates"])
            rounds = {name: [2.0 / (k + 1)] * 4 for k, name in enumerate(names)}
            return Evidence(dict.fromkeys(about["candidates"], ""), rounds)

    monkeypatch.setattr(choose, "recall", known)
    assert main(flags) == 0
    assert "memory order contiguous, compile off" in capsys.readouterr().out
    assert seen == ["auto", "contiguous"]


@pytest.mark.exhaustive
def test_two_processes_time_together_and_one_prints(sd15_path, pairs, tmp_path):
    import subprocess

    from tests.helpers.runs import command, environment

    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    flags = flags_for(sd15_path, pairs, tmp_path / "out", "--dry-run", "timed")
    done = subprocess.run(
        command(*flags, launcher=launcher), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ms a pair") == 1 and "4  pairs at 64 x 64: 2 x 2 x 1" in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_cache_command_has_no_dry_run(sd15_path, pairs, tmp_path, capsys):
    from dpo_fast.cache import main as cache

    assert cache(["build", *flags_for(sd15_path, pairs, tmp_path / "out", "--dry-run")]) == 2
    assert "--dry-run is for `python -m dpo_fast.train`" in capsys.readouterr().err
