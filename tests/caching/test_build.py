"""The cache in whole runs: what is trained from it, what is encoded and how often, and what it takes on the disk."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_fast.cache import main as cache_main
from dpo_fast.caching import build
from dpo_fast.data import PairsSource
from dpo_fast.data.pairs import build_index
from dpo_fast.models import Family
from dpo_fast.train import main
from tests.helpers.pairs import encoded, pickapic, write_jsonl, write_pickapic, write_table
from tests.helpers.runs import assert_same_state, flags_for, lines, opened, start, train

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture
def calls(monkeypatch):
    """How many images and prompts are encoded, and how many image files are opened, in this process."""
    counted = {"images": 0, "prompts": 0, "decoded": 0}

    def counting(owner, name: str, what: str, size) -> None:
        function = getattr(owner, name)

        def counted_function(*arguments, **more):
            counted[what] += size(arguments)
            return function(*arguments, **more)

        monkeypatch.setattr(owner, name, counted_function)

    counting(Family, "encode_images", "images", lambda a: len(a[1]))
    counting(Family, "encode_prompts", "prompts", lambda a: len(a[1]))
    for module in ("data.images", "data.sources", "caching.manifest"):
        counting(sys.modules[f"dpo_fast.{module}"], "decode", "decoded", lambda a: 1)
    counting(sys.modules["dpo_fast.caching.build"], "scaled", "decoded", lambda a: 1)
    return counted


def spoilt(columns: dict[str, list], row: int) -> dict[str, list]:
    """The columns with one image that ends too early."""
    data = columns["jpg_1"][row]
    return {**columns, "jpg_1": [data[: len(data) // 2] if i == row else v for i, v in enumerate(columns["jpg_1"])]}


def recurring(n: int = 12, size: int = 72) -> dict[str, list]:
    """Pairs of five images and three captions."""
    few = pickapic(n=5, size=size, seed=3)["jpg_0"]
    columns = pickapic(n=n, captions=[f"scene {i % 3}" for i in range(n)])
    places = [(i % 5, (i * i + 1 + i) % 5) for i in range(n)]
    places = [(a, b if a != b else (b + 1) % 5) for a, b in places]
    return {**columns, "jpg_0": [few[a] for a, _ in places], "jpg_1": [few[b] for _, b in places]}


def many_sizes(n: int = 12) -> dict[str, list]:
    random = np.random.default_rng(7)
    columns = pickapic(n=n)
    for name in ("jpg_0", "jpg_1"):
        columns[name] = [encoded(random, tuple(random.integers(70, 140, 2).tolist())) for _ in range(n)]
    return columns


# name -> (flags, columns)
VARIANTS = {
    "lora": ([], pickapic),
    "full": (["--tuning", "full", "--mixed_precision", "bf16"], pickapic),
    "flips, dropped captions": (["--hflip", "--proportion_empty_prompts", 0.4], many_sizes),
    "real time ids": (["--time_ids", "real", "--hflip"], many_sizes),
    "recurring, ties, soft": (["--soft_labels"], lambda: recurring() | {"label_0": [0.5, 0.7, *[1.0, 0.0] * 5]}),
    "ties": ([], lambda: pickapic(labels=[0.5, 1.0, 0.5, *[0.0] * 9])),
    "streamed": (["--streaming", "--hflip"], many_sizes),
    "held out": (
        ["--run_validation", "--validation_fraction", 0.3],
        lambda: pickapic(captions=[f"scene {i // 3}" for i in range(12)]),
    ),
}


EXHAUSTIVE = ("held out", "ties", "real time ids")


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.exhaustive) if n in EXHAUSTIVE else n for n in VARIANTS]
)
def test_trained_from_the_cache_or_without_it_the_weights_are_the_same(sdxl_path, tmp_path, name):
    flags, columns = VARIANTS[name]
    data = write_table(tmp_path / "pairs.parquet", columns())
    more = [*flags, "--learning_rate", 1e-3, "--latent_cache_dir", tmp_path / "cache"]
    plain = train(sdxl_path, data, tmp_path / "plain", *more, "--no-cache")
    assert not (tmp_path / "cache").exists()
    first = train(sdxl_path, data, tmp_path / "first", *more)
    again = train(sdxl_path, data, tmp_path / "again", *more)
    for cached in (first, again):
        assert_same_state(plain, cached)
        assert [line["loss"] for line in lines(plain)] == [line["loss"] for line in lines(cached)]
    if "--run_validation" in flags:
        files = [folder / "validation.jsonl" for folder in (plain, first, again)]
        assert len({file.read_text() for file in files}) == 1
        pictures = [(folder / "samples" / "step-4.png").read_bytes() for folder in (plain, first, again)]
        assert len(set(pictures)) == 1


@pytest.mark.parametrize("more", [[], ["--streaming"]], ids=["table", "streamed"])
def test_a_bad_image_keeps_its_place_with_weight_0_as_without_the_cache(sdxl_path, tmp_path, monkeypatch, more):
    """Beyond the pairs that the start check looks at, an image that does not decode."""
    monkeypatch.setitem(build_index.__kwdefaults__, "check_pairs", 2)
    data = write_table(tmp_path / "pairs.parquet", spoilt(pickapic(), 5))
    flags = [*more, "--learning_rate", 1e-3, "--max_bad_fraction", 0.2, "--latent_cache_dir", tmp_path / "cache"]
    flags += ["--train_batch_size", 4]
    plain = train(sdxl_path, data, tmp_path / "plain", *flags, "--no-cache")
    for name in ("first", "again"):
        cached = train(sdxl_path, data, tmp_path / name, *flags)
        assert_same_state(plain, cached)
        for file in ("bad_rows.jsonl",):
            assert (plain / file).read_text() == (cached / file).read_text()
        assert json.loads((cached / "summary.json").read_text())["bad_rows"] == 1


def test_each_distinct_image_and_caption_is_encoded_once(sdxl_path, tmp_path, calls, capsys):
    """Twelve pairs of five images and three captions; then hflip, then other pairs of the same images."""
    data = write_table(tmp_path / "pairs.parquet", recurring())
    more = ["--latent_cache_dir", tmp_path / "cache", "--max_train_steps", 6]
    train(sdxl_path, data, tmp_path / "first", *more)
    assert "24 images are 5 different ones, 12 captions 3; encoded now 5 and 3" in capsys.readouterr().err
    empty = 1  # the empty prompt, at every start
    assert (calls["images"], calls["prompts"]) == (5, 3 + empty)

    calls |= dict.fromkeys(calls, 0)
    train(sdxl_path, data, tmp_path / "again", *more)
    assert "encoded now 0 and 0" in capsys.readouterr().err
    assert calls == {"images": 0, "prompts": empty, "decoded": 0}

    calls |= dict.fromkeys(calls, 0)
    train(sdxl_path, data, tmp_path / "flipped", *more, "--hflip")
    assert (calls["images"], calls["prompts"]) == (5, empty)

    calls |= dict.fromkeys(calls, 0)
    columns = recurring()
    columns = {name: values[::-1] for name, values in columns.items()} | {"caption": ["scene 1", "new"] * 6}
    train(sdxl_path, write_table(tmp_path / "others.parquet", columns), tmp_path / "others", *more)
    assert (calls["images"], calls["prompts"]) == (0, 1 + empty)


@pytest.mark.exhaustive
def test_a_copied_or_touched_data_set_is_hashed_again_and_not_encoded(sdxl_path, tmp_path, calls):
    data = write_table(tmp_path / "pairs.parquet", recurring())
    more = ["--latent_cache_dir", tmp_path / "cache", "--max_train_steps", 6]
    train(sdxl_path, data, tmp_path / "first", *more)
    shutil.copytree(write_jsonl(tmp_path / "jsonl", recurring()), tmp_path / "copy")
    data.touch()
    for number, touched in enumerate((data, tmp_path / "jsonl", tmp_path / "copy")):
        calls |= dict.fromkeys(calls, 0)
        train(sdxl_path, touched, tmp_path / f"run-{number}", *more)
        assert calls["images"] == 0 and calls["prompts"] == 1


def test_an_image_replaced_in_place_is_seen(sdxl_path, tmp_path, calls):
    folder = write_jsonl(tmp_path / "pairs", pickapic(n=4))
    more = ["--latent_cache_dir", tmp_path / "cache"]
    train(sdxl_path, folder, tmp_path / "first", *more)
    (folder / "images" / "2-chosen.jpg").write_bytes(pickapic(n=1, seed=9)["jpg_0"][0])
    calls |= dict.fromkeys(calls, 0)
    cached = train(sdxl_path, folder, tmp_path / "second", *more)
    assert calls["images"] == 1
    assert_same_state(cached, train(sdxl_path, folder, tmp_path / "plain", "--no-cache"))


def test_only_what_the_run_visits_is_encoded(sdxl_path, pairs, tmp_path, calls):
    more = ["--latent_cache_dir", tmp_path / "cache", "--max_train_steps", 2]
    train(sdxl_path, pairs, tmp_path / "short", *more)  # four pairs
    assert (calls["images"], calls["prompts"]) == (8, 5)
    train(sdxl_path, pairs, tmp_path / "short", *more, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert calls["images"] == 16
    assert_same_state(tmp_path / "short", train(sdxl_path, pairs, tmp_path / "plain", "--no-cache"))


def test_a_run_goes_on_with_the_cache_or_without(sdxl_path, pairs, tmp_path):
    whole = train(sdxl_path, pairs, tmp_path / "whole", "--no-cache")
    for name, flags in (("from", (["--no-cache"], [])), ("to", ([], ["--no-cache"]))):
        more = ["--latent_cache_dir", tmp_path / "cache"]
        train(sdxl_path, pairs, tmp_path / name, *more, *flags[0], "--max_train_steps", 2)
        train(sdxl_path, pairs, tmp_path / name, *more, *flags[1], "--resume_from_checkpoint", "latest")
        assert_same_state(whole, tmp_path / name)


@pytest.mark.exhaustive
def test_a_streamed_hub_set_is_read_once_and_not_asked_for_again(sdxl_path, tmp_path, monkeypatch, capsys):
    """A hub set, but for the hub: once what a run needs of it is known, it is not opened."""
    from dpo_fast.training import batches

    data = write_table(tmp_path / "pairs.parquet", many_sizes())
    plain = train(sdxl_path, data, tmp_path / "plain", "--streaming", "--no-cache")
    plain_32 = train(sdxl_path, data, tmp_path / "plain-32", "--streaming", "--no-cache", "--resolution", 32)
    open_source, opens = batches.open_source, []

    def hub(wanted):
        assert wanted.name == "owner/pairs"
        opens.append(wanted.name)
        source = open_source(replace(wanted, name=data))
        source.identity = replace(source.identity, look=str)
        return source

    monkeypatch.setattr(batches, "open_source", hub)
    more = ["--streaming", "--latent_cache_dir", tmp_path / "cache"]
    for number in range(2):
        cached = train(sdxl_path, "owner/pairs", tmp_path / str(number), *more)
        assert opens == ["owner/pairs"]
        assert_same_state(plain, cached)
    train(sdxl_path, "owner/pairs", tmp_path / "elsewhere", *more[:1], "--latent_cache_dir", tmp_path / "new")
    assert len(opens) == 2
    # Its rows are known, but not at this size: the images are needed again.
    cached = train(sdxl_path, "owner/pairs", tmp_path / "32", *more, "--resolution", 32)
    assert len(opens) == 3
    assert_same_state(plain_32, cached)

    def refused(number: int) -> None:
        flags = flags_for(sdxl_path, "owner/pairs", tmp_path / f"changed-{number}", *more, "--resolution", 96)
        assert main(flags) == 2
        error = capsys.readouterr().err
        assert "row 3 is not what it was" in error and "pairs-" in error and "delete that folder" in error

    columns = many_sizes()
    columns["caption"][3] = "another"
    write_table(data, columns)
    refused(0)
    columns = many_sizes()
    columns["jpg_1"][3] = columns["jpg_1"][4]
    write_table(data, columns)
    refused(1)


def test_only_streams_have_manifests_of_a_format(tmp_path, monkeypatch):
    """A stream's manifest holds labels, as they were read when it was made; that of a table does not."""

    def name(**more):
        return build.manifest_of(tmp_path, PairsSource("a/b", **more), "x").folder.name

    table, stream = name(), name(streaming=True)
    assert table == "pairs-946611352a932922"
    monkeypatch.setattr(build, "STREAM_FORMAT", build.STREAM_FORMAT + 1)
    assert name() == table and name(streaming=True) != stream


@pytest.mark.parametrize("change", ["caption", "label"])
def test_a_changed_text_of_streamed_lines_is_seen(sdxl_path, tmp_path, change):
    folder = write_jsonl(tmp_path / "pairs", pickapic(n=4))
    more = ["--learning_rate", 1e-3, "--streaming", "--latent_cache_dir", tmp_path / "cache"]
    train(sdxl_path, folder, tmp_path / "before", *more)
    (file,) = folder.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        if change == "caption":
            row["prompt"] = f"no longer {row['prompt']}"
        else:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cached = train(sdxl_path, folder, tmp_path / "after", *more)
    assert_same_state(cached, train(sdxl_path, folder, tmp_path / "plain", *more, "--no-cache"))


def test_a_build_and_a_run_compute_in_the_same_precision(sdxl_path, pairs, tmp_path, monkeypatch):
    """torch lets convolutions use TF32 unless told otherwise; a run tells it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen, encode = [], Family.encode_images

    def noted(family: Family, *given: object) -> torch.Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return encode(family, *given)

    monkeypatch.setattr(Family, "encode_images", noted)
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", "--latent_cache_dir", tmp_path / "cache")
    assert cache_main(["build", *flags]) == 0
    assert seen and not any(seen)
    assert torch.backends.cudnn.allow_tf32  # and the process is left as it was


@pytest.mark.exhaustive
def test_two_processes_build_and_train_as_one(sdxl_path, tmp_path):
    data = write_table(tmp_path / "pairs.parquet", recurring())
    one = train(sdxl_path, data, tmp_path / "one", "--gradient_accumulation_steps", 2, "--no-cache")
    for number in range(2):
        flags = flags_for(sdxl_path, data, tmp_path / str(number), "--latent_cache_dir", tmp_path / "cache")
        process = start(*flags, launcher=TORCHRUN)
        _, error = process.communicate(timeout=180)
        assert process.returncode == 0, error
        assert f"encoded now {[5, 0][number]} and {[3, 0][number]}" in error
        assert_same_state(one, tmp_path / str(number))
    ranks = {path.name.split("-")[1] for path in (tmp_path / "cache").glob("latents-*/shard-*.bin")}
    assert ranks == {"0", "1"}


def test_the_encoders_are_gone_while_training(sdxl_path, pairs, tmp_path):
    free = opened(flags_for(sdxl_path, pairs, tmp_path / "a")).family.pipeline
    assert free.vae is free.text_encoder is free.text_encoder_2 is None
    for flags in (["--run_validation"], ["--no-cache"], ["--tuning", "full"]):
        kept = opened(flags_for(sdxl_path, pairs, tmp_path / "".join(flags), *flags)).family.pipeline
        assert None not in (kept.vae, kept.text_encoder, kept.text_encoder_2)


def test_another_recipe_is_another_folder(sdxl_path, pairs, tmp_path, calls):
    """Another resolution or VAE dtype shares no latent; another caption dropout shares everything."""
    more = ["--latent_cache_dir", tmp_path / "cache", "--max_train_steps", 1]
    seen = []
    for number, flags in enumerate(([], ["--resolution", 32], ["--proportion_empty_prompts", 0.5])):
        calls |= dict.fromkeys(calls, 0)
        train(sdxl_path, pairs, tmp_path / str(number), *more, *flags)
        seen.append((calls["images"], calls["prompts"]))
    assert seen == [(4, 3), (4, 1), (0, 1)]
    assert len(list((tmp_path / "cache").glob("latents-*"))) == 2
    assert len(list((tmp_path / "cache").glob("text-*"))) == 1


def test_random_crops_are_not_cached(sdxl_path, pairs, tmp_path, capsys):
    assert main(flags_for(sdxl_path, pairs, tmp_path / "run", "--random_crop")) == 2
    assert "--random_crop needs --no-cache" in capsys.readouterr().err
    assert main(flags_for(sdxl_path, pairs, tmp_path / "run", "--random_crop", "--no-cache")) == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["sd15_path", "sdxl_path"])
def test_the_disk_it_takes_is_what_is_predicted(kind, tmp_path, request):
    """What is counted for an image and a prompt, against the files."""
    from dpo_fast.command_line import parse
    from dpo_fast.training.costs import costs_of

    model, n = request.getfixturevalue(kind), 64
    data = write_pickapic(tmp_path / "pairs.parquet", n=n)
    flags = flags_for(model, data, tmp_path / "run", "--latent_cache_dir", tmp_path / "cache", "--max_train_steps", n)
    costs = costs_of(parse(flags)[0], "cpu")
    assert main(flags) == 0
    for name, count, each in (("latents", 2 * n, costs.latent), ("text", n, costs.prompt)):
        size = sum(path.stat().st_size for path in (tmp_path / "cache").glob(f"{name}-*/shard-*.bin"))
        assert size == count * each
    index = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/shard-*.json"))
    assert index < 120 * 3 * n


@pytest.mark.parametrize("where", ["--cache", "--no-cache"])
def test_an_embedding_that_overflows_is_refused_by_name(sd15_path, tmp_path, monkeypatch, capfd, where):
    pairs = write_pickapic(tmp_path / "p.parquet", n=4, captions=["one", "two", "too much", "four"])
    encode = Family.encode_prompts

    def overflowing(family, prompts):
        encoded = encode(family, prompts)
        for row, prompt in enumerate(prompts):
            if prompt == "too much":
                encoded["prompt_embeds"][row, 3, 5] = torch.inf
        return encoded

    monkeypatch.setattr(Family, "encode_prompts", overflowing)
    more = ["--latent_cache_dir", tmp_path / "cache", where]
    assert main(flags_for(sd15_path, pairs, tmp_path / "run", *more)) == 2
    said = capfd.readouterr().err
    named = "caption 'too much'" if where == "--cache" else "row 2"
    assert f"error: {named}: the text encoders gave a non-finite embedding" in said and "Traceback" not in said


@pytest.mark.parametrize("more", [["--cache"], ["--no-cache"], ["--streaming"], ["--streaming", "--no-cache"]], ids=str)
def test_captions_that_are_cut_off_are_counted_and_said(sd15_path, tmp_path, caplog, monkeypatch, more):
    captions = ["short", "word " * 100, "word " * 100, "other " * 90, "so", "brief"]
    pairs = write_pickapic(tmp_path / "p.parquet", n=6, captions=captions)
    folder = train(sd15_path, pairs, tmp_path / "run", "--latent_cache_dir", tmp_path / "cache", *more)
    unknown = more == ["--streaming", "--no-cache"]
    assert json.loads((folder / "summary.json").read_text())["captions_cut"] == (None if unknown else 3)
    said = "3 of 6 captions are longer than 75 tokens and are cut off there, for example that of row 1"
    assert (said in caplog.text) is not unknown
    if not unknown:  # counted once: resuming takes it from the checkpoint
        monkeypatch.setattr(Family, "cut_off", None)
        (folder / "summary.json").unlink()
        again = [*more, "--latent_cache_dir", tmp_path / "cache", "--resume_from_checkpoint", "latest"]
        train(sd15_path, pairs, folder, *again)
        assert json.loads((folder / "summary.json").read_text())["captions_cut"] == 3


def test_pairs_that_say_nothing_are_counted_in_a_run(sd15_path, tmp_path, capfd):
    columns = pickapic(n=8, labels=[1.0, 0.0] * 4)
    columns["has_label"] = [True] * 7 + [False]
    columns["jpg_1"][2] = columns["jpg_0"][2]
    columns["image_0_uid"], columns["image_1_uid"] = ([f"{side}{k}" for k in range(8)] for side in "ab")
    pairs = write_table(tmp_path / "p.parquet", columns)
    kept = []
    for more in (["--cache"], ["--no-cache"]):
        folder = tmp_path / f"run{more[0]}"
        kept.append(train(sd15_path, pairs, folder, "--latent_cache_dir", tmp_path / "cache", *more))
        assert "pairs: 6 of 8 rows, 0 ties dropped, 1 without a label dropped, 1 bad" in capfd.readouterr().err
        summary = json.loads((folder / "summary.json").read_text())
        names = ("unlabelled", "contradicted", "duplicates", "identical_images", "bad_rows")
        assert [summary[name] for name in names] == [1, 0, 0, 1, 1]
        assert "is the same image" in (folder / "bad_rows.jsonl").read_text()
    assert_same_state(*kept)
