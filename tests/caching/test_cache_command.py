"""The cache's commands, and what they and training give when something is wrong with it."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dpo_fast.cache import main
from dpo_fast.store import locked, writing
from dpo_fast.train import main as train_main
from tests.helpers import disks, slow_build
from tests.helpers.pairs import pickapic, write_pickapic, write_table
from tests.helpers.runs import assert_same_state, environment, flags_for, train


def build_flags(model: Path, pairs: Path, cache: Path, *more: object) -> list[str]:
    """Flags of a build; --output_dir is accepted, and nothing is written there."""
    flags = flags_for(model, pairs, cache.parent / "no-run", *more, "--latent_cache_dir", cache)
    at = flags.index("--seed")
    return flags[:at] + flags[at + 2 :]  # without a seed: all pairs


def built(model: Path, pairs: Path, cache: Path, *more: object) -> Path:
    assert main(["build", *build_flags(model, pairs, cache, *more)]) == 0
    assert not (cache.parent / "no-run").exists()
    return cache


def contents(cache: Path) -> dict[str, bytes]:
    """Every file of a cache but the locks."""
    files = [path for path in cache.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


def refused(work, said: list[str], capfd) -> None:
    capfd.readouterr()
    assert work() == 2
    error = capfd.readouterr().err
    (line,) = [text for text in error.replace("\r", "\n").splitlines() if text.startswith("dpo_fast: error: ")]
    assert "Traceback" not in error
    assert all(words in line for words in said), line


def shards(cache: Path, kind: str) -> list[Path]:
    return sorted(cache.glob(f"{kind}-*/shard-*.bin"))


# ---- the commands ----------------------------------------------------------------------------------------------


def test_building_encodes_all_pairs_and_training_then_none(sdxl_path, pairs, tmp_path, capfd):
    cache = built(sdxl_path, pairs, tmp_path / "cache")
    said = capfd.readouterr().err
    assert "images: 24 of 12 pairs are 24 different ones, 24 encoded now" in said
    assert "captions: 12 are 12 different ones, 12 encoded now" in said
    train(sdxl_path, pairs, tmp_path / "run", "--latent_cache_dir", cache)
    assert "encoded now 0 and 0" in capfd.readouterr().err


def test_info_lists_what_there_is(sdxl_path, pairs, tmp_path, capfd):
    cache = built(sdxl_path, pairs, tmp_path / "cache")
    assert main(["info", "--latent_cache_dir", str(cache)]) == 0
    said = capfd.readouterr().out
    assert "24 entries" in said and "12 entries" in said and "resolution 64" in said and "pairs.parquet" in said


def test_pruning_shows_first_and_deletes_when_asked(sdxl_path, pairs, tmp_path, capfd):
    cache = built(sdxl_path, pairs, tmp_path / "cache")
    built(sdxl_path, pairs, tmp_path / "cache", "--resolution", 32)
    (old,) = [
        folder for folder in cache.glob("latents-*") if '"resolution": 32' in (folder / "recipe.json").read_text()
    ]
    long_ago = time.time() - 40 * 86400
    os.utime(old / "recipe.json", (long_ago, long_ago))
    where = ["--latent_cache_dir", str(cache)]
    before = contents(cache)
    assert main(["prune", *where, "--unused_days", "30"]) == 0
    said = capfd.readouterr().out
    assert "would go" in said and old.name in said and contents(cache) == before
    assert main(["prune", *where, "--unused_days", "30", "--yes"]) == 0
    assert not old.exists() and len(list(cache.glob("latents-*"))) == 1
    (text,) = cache.glob("text-*")
    assert main(["prune", *where, "--name", text.name, "--yes"]) == 0 and not text.exists()
    assert main(["prune", *where, "--max_gib", "0", "--yes"]) == 0
    assert not contents(cache)


def test_what_is_in_use_by_a_builder_is_not_pruned(sdxl_path, pairs, tmp_path, capfd):
    cache = built(sdxl_path, pairs, tmp_path / "cache")
    with locked(next(cache.glob("latents-*"))):
        refused(
            lambda: main(["prune", "--latent_cache_dir", str(cache), "--max_gib", "0", "--yes"]), ["process"], capfd
        )
    assert shards(cache, "latents")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["info", "--latent_cache_dir", "/nowhere"], ["/nowhere", "--latent_cache_dir"]),
        (["prune", "--nme", "x"], ["--nme"]),
        (["polish"], ["polish"]),
        ([], ["command"]),
        (["build", "--resolution", "64", "--dataset_name", "x"], ["--pretrained_model_name_or_path"]),
    ],
)
def test_wrong_commands_in_one_line(argv, said, capfd):
    refused(lambda: main(argv), said, capfd)


# ---- faults ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_killed_again_and_again_it_ends_as_one_built_in_peace(sdxl_path, tmp_path, streaming, seed):
    """kill -9 at random moments, six times each way, most of them while it encodes; then every file is compared."""
    n, size = 90, 2048  # shards of 4 latents, and of one or none prompts
    few = pickapic(n=25, seed=4)
    columns = pickapic(n=n, captions=[f"scene {i % 40}" for i in range(n)])
    columns["jpg_0"] = [few["jpg_0"][i % 25] if i % 3 else image for i, image in enumerate(columns["jpg_0"])]
    columns["jpg_1"][7] = columns["jpg_1"][7][:300]  # does not decode
    pairs = write_table(tmp_path / "pairs.parquet", columns)
    more = ["--max_bad_fraction", "0.1", "--hflip", *(["--streaming", "--max_train_steps", 100] if streaming else [])]

    def build(cache: Path) -> multiprocessing.Process:
        return slow_build.started(size, ["build", *build_flags(sdxl_path, pairs, cache, *more)])

    peaceful = build(tmp_path / "peace")
    peaceful.join()
    assert peaceful.exitcode == 0
    cache, kills, grown = tmp_path / "killed", 0, []
    chance = random.Random(seed)
    whole = slow_build.written(tmp_path / "peace")
    while kills < 6:
        process = build(cache)
        before = slow_build.written(cache) if cache.exists() else 0
        target = before + chance.uniform(0, 0.1) * whole
        while process.is_alive() and (not cache.exists() or slow_build.written(cache) <= max(before, target)):
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before it could be killed"
        kills += 1
        grown.append(slow_build.written(cache) - before)
    assert sum(growth > 0 for growth in grown) >= 3
    last = build(cache)
    last.join()
    assert last.exitcode == 0
    peace, killed = contents(tmp_path / "peace"), contents(cache)
    assert peace.keys() == killed.keys()
    assert [name for name in peace if peace[name] != killed[name]] == []
    train(sdxl_path, pairs, tmp_path / "a", *more, "--latent_cache_dir", cache)
    train(sdxl_path, pairs, tmp_path / "b", *more, "--no-cache")
    assert_same_state(tmp_path / "a", tmp_path / "b")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB; needs the right to mount."""
    with disks.small_disk(tmp_path / "disk", "512k") as disk:
        yield disk


@pytest.mark.faults
@pytest.mark.parametrize("more", [[], ["--streaming", "--max_train_steps", 100]], ids=["table", "streamed"])
def test_a_disk_that_is_too_small_is_found_before_encoding(sdxl_path, tmp_path, small_disk, capfd, more):
    pairs = write_pickapic(tmp_path / "pairs.parquet", n=120 if not more else 800)
    flags = build_flags(sdxl_path, pairs, small_disk / "cache", *more)
    refused(lambda: main(["build", *flags]), ["MiB free", "need", "--latent_cache_dir"], capfd)
    assert not shards(small_disk, "*")


@pytest.mark.faults
def test_a_disk_that_fills_up_keeps_what_was_encoded(sdxl_path, pairs, tmp_path, small_disk, capfd, monkeypatch):
    """Somebody else takes the room; when it is there again the build goes on, to the same files."""
    whole = built(sdxl_path, pairs, tmp_path / "whole")
    monkeypatch.setattr("dpo_fast.caching.build.CacheBuild.check_space", lambda self: None)
    (small_disk / "else").write_bytes(bytes(400 * 1024))
    flags = build_flags(sdxl_path, pairs, small_disk / "cache")
    refused(lambda: main(["build", *flags]), ["No space left", "what was encoded is kept", "same command"], capfd)
    (small_disk / "else").unlink()
    assert main(["build", *flags]) == 0
    said = capfd.readouterr().err
    assert "24 encoded now" not in said
    assert contents(whole) == contents(small_disk / "cache")


@pytest.mark.faults
def test_a_read_only_cache_serves_but_does_not_grow(sdxl_path, pairs, tmp_path, small_disk, capfd):
    cache = built(sdxl_path, pairs, small_disk / "cache")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    train(sdxl_path, pairs, tmp_path / "run", "--latent_cache_dir", cache)
    more = ["--latent_cache_dir", cache, "--hflip"]
    said = ["cannot be written", "Read-only", "--no-cache"]
    refused(lambda: train_main(flags_for(sdxl_path, pairs, tmp_path / "flipped", *more)), said, capfd)
    assert main(["build", *build_flags(sdxl_path, pairs, cache)]) == 0  # nothing is missing


@pytest.mark.faults
def test_a_read_only_cache_serves_a_copy_of_the_pairs(sdxl_path, pairs, tmp_path, small_disk):
    """Whose images have the names that are there, once they are read."""
    cache = built(sdxl_path, pairs, small_disk / "cache")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    copy = shutil.copy(pairs, tmp_path / "elsewhere.parquet")
    more = ["--latent_cache_dir", cache]
    assert_same_state(
        train(sdxl_path, copy, tmp_path / "copy", *more), train(sdxl_path, pairs, tmp_path / "run", *more)
    )


def test_too_many_bad_images_are_refused_each_time(sdxl_path, tmp_path, capfd):
    """What the first build kept of them does not let the second one pass."""
    columns = pickapic(n=30)
    columns["jpg_1"] = [data[:300] if row in (9, 11) else data for row, data in enumerate(columns["jpg_1"])]
    pairs = write_table(tmp_path / "pairs.parquet", columns)
    more = ["--streaming", "--max_train_steps", 100, "--max_bad_fraction", 0.0011]
    flags = build_flags(sdxl_path, pairs, tmp_path / "cache", *more)
    for _ in range(3):
        refused(lambda: main(["build", *flags]), ["--max_bad_fraction", "cannot be decoded"], capfd)


@pytest.mark.faults
@pytest.mark.parametrize(
    "file", ["latents-*/shard-*.json", "text-*/recipe.json", "pairs-*/manifest.json", "pairs-*/rows-*"]
)
def test_damage_beside_the_records_is_found_too(sdxl_path, pairs, tmp_path, capfd, file):
    cache = built(sdxl_path, pairs, tmp_path / "cache")
    before, verify = contents(cache), ["verify", "--latent_cache_dir", str(cache)]
    (path,) = cache.glob(file)
    os.truncate(path, path.stat().st_size // 2)
    assert main(["info", *verify[1:]]) == 0
    capfd.readouterr()
    assert main(verify) == 2
    said = capfd.readouterr()
    assert path.parent.name in said.out and "1 damaged" in said.out and "Traceback" not in said.err
    assert main([*verify, "--remove"]) == 0
    assert main(["info", *verify[1:]]) == 0
    built(sdxl_path, pairs, cache)
    assert contents(cache) == before and main(verify) == 0


@pytest.mark.faults
def test_nothing_is_removed_under_a_builder(sdxl_path, pairs, tmp_path, capfd):
    cache = built(sdxl_path, pairs, tmp_path / "cache")
    (shard,) = shards(cache, "latents")
    os.truncate(shard, 10)
    with locked(shard.parent):
        refused(lambda: main(["verify", "--latent_cache_dir", str(cache), "--remove"]), ["is being written by"], capfd)
    assert shard.exists()


def test_what_a_run_uses_counts_as_used(sdxl_path, pairs, tmp_path):
    cache = built(sdxl_path, pairs, tmp_path / "cache")
    marks = [*cache.glob("*/recipe.json"), *cache.glob("*/manifest.json")]
    assert len(marks) == 3
    for mark in marks:
        os.utime(mark, (0, 0))
    train(sdxl_path, pairs, tmp_path / "run", "--latent_cache_dir", cache)
    assert all(time.time() - mark.stat().st_mtime < 600 for mark in marks)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_flipped_byte_is_found_named_and_mended(sdxl_path, pairs, tmp_path, capfd, kind):
    cache = built(sdxl_path, pairs, tmp_path / "cache")
    before = contents(cache)
    (shard,) = shards(cache, kind)
    data = bytearray(shard.read_bytes())
    place = random.randrange(len(data))
    data[place] ^= 1 << random.randrange(8)
    shard.write_bytes(data)
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", "--latent_cache_dir", cache, "--max_train_steps", 6)
    refused(lambda: train_main(flags), [str(shard), "damaged", "verify --remove"], capfd)
    verify = ["verify", "--latent_cache_dir", str(cache)]
    assert main(verify) == 2
    row = place // (len(data) // len(json.loads(shard.with_suffix(".json").read_text())["keys"]))
    assert f"{shard}: its sha256 differs; damaged records: {row}\n" in capfd.readouterr().out
    assert main([*verify, "--remove"]) == 0
    built(sdxl_path, pairs, cache)
    assert contents(cache) == before and main(verify) == 0


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["cut off", "missing", "index cut off", "index changed"])
def test_a_truncated_shard_is_refused_and_built_again(sdxl_path, pairs, tmp_path, capfd, monkeypatch, kind):
    monkeypatch.setattr(writing, "SHARD_BYTES", 4096)
    cache = built(sdxl_path, pairs, tmp_path / "cache")
    before = contents(cache)
    shard = shards(cache, "latents")[1]
    index = shard.with_suffix(".json")
    if kind == "cut off":
        os.truncate(shard, shard.stat().st_size - 100)
    elif kind == "missing":
        shard.unlink()
    elif kind == "index cut off":
        os.truncate(index, index.stat().st_size // 2)
    else:
        index.write_text(index.read_text().replace("[72,72,0,0]", "[72,71,0,0]", 1))
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", "--latent_cache_dir", cache)
    refused(lambda: train_main(flags), [shard.stem, "dpo_fast.cache build"], capfd)
    capfd.readouterr()
    built(sdxl_path, pairs, cache)
    assert "8 encoded now" in capfd.readouterr().err  # of that shard alone
    assert contents(cache) == before
    assert train_main(flags) == 0


@pytest.mark.faults
def test_a_foreign_cache_is_refused_with_what_differs(sdxl_path, pairs, tmp_path, capfd):
    cache = built(sdxl_path, pairs, tmp_path / "cache")
    (folder,) = cache.glob("latents-*")
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", "--latent_cache_dir", cache)
    recipe = folder / "recipe.json"
    good = recipe.read_text()
    for change, said in (
        (lambda value: value["facts"].update(resolution=1024), "facts.resolution: 64 -> 1024"),
        (lambda value: value.update(format=7), "format: 1 -> 7"),
        (lambda value: value["facts"].update(vae="0" * 16), "facts.vae:"),
    ):
        value = json.loads(good)
        change(value)
        recipe.write_text(json.dumps(value))
        refused(lambda: train_main(flags), [folder.name, said, "delete the folder"], capfd)
    recipe.write_text(good)
    built(sdxl_path, pairs, tmp_path / "other", "--resolution", 32)
    for suffix in (".bin", ".json"):  # a shard of another recipe, of the right name
        shutil.copy(shards(tmp_path / "other", "latents")[0].with_suffix(suffix), folder)
    refused(lambda: train_main(flags), ["belongs to recipe"], capfd)


@contextmanager
def held(folder: Path, seconds: float) -> Iterator[subprocess.Popen]:
    """Another process that builds in `folder` for so long."""
    holder = "import sys, time; from pathlib import Path; from dpo_fast.store import locked\n"
    holder += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(float(sys.argv[2]))"
    command = [sys.executable, "-c", holder, folder, str(seconds)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.faults
def test_a_second_builder_is_told_who_builds(sdxl_path, pairs, tmp_path, capfd):
    cache = built(sdxl_path, pairs, tmp_path / "cache")
    (folder,) = cache.glob("latents-*")
    flags = build_flags(sdxl_path, pairs, cache, "--hflip")
    with held(folder, 60) as process:
        refused(lambda: main(["build", *flags]), [f"process {process.pid} on ", "wait"], capfd)
        assert main(["build", *build_flags(sdxl_path, pairs, cache)]) == 0  # what is complete is not held up
    assert main(["build", *flags]) == 0
    assert not (folder / ".lock").exists()


@pytest.mark.faults
def test_a_run_waits_for_the_builder(sdxl_path, pairs, tmp_path, caplog):
    cache = built(sdxl_path, pairs, tmp_path / "cache")
    (folder,) = cache.glob("latents-*")
    with held(folder, 3) as process:
        train(sdxl_path, pairs, tmp_path / "run", "--hflip", "--latent_cache_dir", cache)
        assert process.wait(timeout=10) == 0
    (told,) = (record.message for record in caplog.records if "waiting" in record.message)
    assert f"process {process.pid} on " in told
