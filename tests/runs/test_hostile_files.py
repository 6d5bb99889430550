"""Files and names that broke a reader once: each is refused in one line, or read, and never ends in a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dpo_fast import cli, hub_revisions, parallel
from dpo_fast.caching.manifest import Manifest
from dpo_fast.caching.upkeep import verify
from dpo_fast.checksums import Damaged, file_digest, signed, signed_text, write_signed_json
from dpo_fast.command_line import parse
from dpo_fast.data import build_index
from dpo_fast.data.relabelled import check_labels
from dpo_fast.errors import BadInput, Unresponsive
from dpo_fast.evaluation.prompts import read_prompts
from dpo_fast.files import exists, is_inside, parse_json, user_path
from dpo_fast.relabeling.labels import NOTE, note_of
from dpo_fast.scorers import kept_scores
from dpo_fast.store import Field, Recipe, log_keys, mend
from dpo_fast.training import checkpoint, resume, run_folder
from tests.helpers.pairs import as_image_feature, open_pairs, pickapic, write_jsonl, write_table
from tests.helpers.runs import environment

DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5000


def one_line(match: str, work, *arguments, kind: type[Exception] = BadInput, **options) -> str:
    """The message of the error that `work` raises."""
    with pytest.raises(kind, match=match or None) as caught:
        work(*arguments, **options)
    assert len(" ".join(str(caught.value).split())) < 3000
    return str(caught.value)


# ---- recipes -----------------------------------------------------------------------------------------------------

RECIPES = {
    "UTF-16": ("seed: 1\n".encode("utf-16"), "UTF-8"),
    "Latin-1": ("validation_prompts: [Zürich]\n".encode("latin-1"), "UTF-8"),
    "5,000 digits": (f"seed: {LONG}\n".encode(), "not YAML"),
    "5,000 hexadecimal digits": (f"seed: 0x{'f' * 5000}\n".encode(), "too long"),
    "no date": (b"seed: 2001-13-45\n", "not YAML"),
    "no float": (b"seed: !!float x\n", "not YAML"),
    "no integer": (b"seed: !!int ''\n", "not YAML"),
    "no boolean": (b"compile: !!bool perhaps\n", "not YAML"),
    "code": (b"seed: !!python/object/apply:os.system [ls]\n", "not YAML"),
    "nested": (b"[" * 20_000, "nested too deeply"),
    "a mapping": (b"seed: {a: 1}\n", "seed holds a dict"),
    "lists in a list": (b"lora_targets: [[a]]\n", "lora_targets holds a list"),
    "a list as a name": (b"? [a, b]\n: 1\n", "not YAML"),
    "a date as a name": (b"2001-01-01: 1\n", "unknown flag '2001_01_01'"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe(tmp_path, name):
    data, match = RECIPES[name]
    (tmp_path / "recipe.yaml").write_bytes(data)
    one_line(match, parse, ["--config", str(tmp_path / "recipe.yaml")])


def test_a_recipe_whose_aliases_stand_for_gigabytes_is_not_written_out(tmp_path):
    nested = "&a0 [lol]"
    for k in range(1, 9):
        nested = f"&a{k} [{nested}{f', *a{k - 1}' * 9}]"  # 9^8 words, if they were written out
    (tmp_path / "recipe.yaml").write_text(f"lora_targets: {nested}\n")
    one_line("lora_targets holds a list", parse, ["--config", str(tmp_path / "recipe.yaml")])


# ---- names -------------------------------------------------------------------------------------------------------


def test_names_that_no_file_can_have():
    for name in ("x" * 500, "o/" + "x" * 500, "a\0b"):
        assert not exists(Path(name))
        one_line("cannot be opened|does not exist", open_pairs, name)
        assert hub_revisions.revision_of(name) == "not fetched"


@pytest.mark.parametrize("name", ["/", "/.", "//"])
def test_the_root_is_no_data_set(name):
    """It was searched for parquet files, /proc and all."""
    one_line("root of the file system", open_pairs, name)


def test_names_in_a_file_are_of_its_folder():
    assert is_inside("a") and is_inside("a/b.parquet") and is_inside("..a")
    for name in ("", "..", "../a", "a/../../b", "/a", "a\0", None, 3, ["a"]):
        assert not is_inside(name), name


@pytest.fixture
def saved(tmp_path):
    """A folder of save_to_disk, beside a secret one."""
    for name in ("saved", "secret"):
        as_image_feature(pickapic(n=2, size=8)).save_to_disk(str(tmp_path / name))
    return tmp_path / "saved"


def test_a_saved_set_that_names_files_elsewhere_is_refused(saved):
    state = json.loads((saved / "state.json").read_text())
    secret = "../secret/" + state["_data_files"][0]["filename"]
    (saved / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": secret}]}))
    for streaming in (False, True):
        one_line("outside the folder", open_pairs, saved, streaming=streaming)


@pytest.mark.parametrize("splits", [["../secret"], ["/"], [1], "train", [], None, {"a": 1}])
def test_splits_elsewhere_are_refused(saved, splits):
    (saved.parent / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    one_line("no splits|cannot be opened", open_pairs, saved.parent)


def test_a_checkpoint_that_names_files_elsewhere_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, {"weights": {"a": torch.ones(1)}}, {"step": 1})
    save_file({"secret": torch.ones(1)}, tmp_path / "secret.safetensors")
    for name in ("../secret", str(tmp_path / "secret")):
        files = {name: file_digest(tmp_path / "secret.safetensors")}
        write_signed_json(tmp_path / "checkpoint-1" / "state.json", {"step": 1, "files": files})
        one_line("not in its folder", checkpoint.load, tmp_path / "checkpoint-1")


@pytest.mark.parametrize(
    "lacking", ["step", "config", "config.seed", "notes", "bad_rows", "weights", "kl", "loss_scale", "pairs"]
)
def test_a_state_that_is_not_of_a_run_is_refused(tmp_path, lacking):
    """One without a digest, as earlier versions wrote them, is not checked for damage."""
    config = {"seed": 1, "resolution": 64, "max_train_steps": 2}
    state = {"step": 1, "config": config, "notes": {}, "bad_rows": [], "optimizer_values": {}}
    state["fingerprints"] = fingerprints = {"pairs": "p", "base weights": "w"}
    counters = {name: torch.tensor(0.0) for name in resume.KEPT_COUNTERS}
    files = {"weights": {"a": torch.ones(1)}, "optimizer": {"a": torch.ones(1)}, "counters": counters}
    checkpoint.save(tmp_path, 1, files, state)
    assert resume._load_checkpoint(tmp_path / "checkpoint-1")[1]["step"] == 1
    for place in (state, config, files, counters, fingerprints):
        place.pop(lacking.removeprefix("config."), None)
    checkpoint.save(tmp_path, 2, files, state)
    one_line(f"it lacks .*{lacking}", resume._load_checkpoint, tmp_path / "checkpoint-2")


@pytest.mark.parametrize("result", [{"../secret": "0"}, {"/etc/hostname": "0"}, ["a"], 3, None])
def test_a_summary_that_names_files_elsewhere_is_refused(tmp_path, result):
    (tmp_path / "config.yaml").write_text(signed_text("seed: 1\n"))
    write_signed_json(tmp_path / "summary.json", {"steps": 1, "result": result})
    one_line("no files of this folder", run_folder.check_result, tmp_path, kind=Damaged)


ABOUT = {
    "description": "pairs",
    "identity": "pairs",
    "columns": {"images": ["a", "b"], "label": None, "caption": "c"},
    "ended": True,
}


def test_a_manifest_as_it_is_written_is_read(tmp_path):
    write_signed_json(tmp_path / "manifest.json", ABOUT)
    assert Manifest(tmp_path).columns.images == ("a", "b")


@pytest.mark.parametrize(
    "change",
    [
        *({"rows": name} for name in ("../secret.parquet", "/etc/hostname", 3, ["a"])),
        *({"columns": columns} for columns in (None, [], {}, {"images": 3})),
        {"columns": {"images": ["a"], "label": 1, "caption": "c"}},
        *({"ended": "yes"}, {"identity": None}, {"description": ["a"]}),
    ],
    ids=str,
)
def test_a_manifest_that_says_something_else_is_refused(tmp_path, change):
    write_signed_json(tmp_path / "manifest.json", {**ABOUT, **change})
    one_line("delete the folder", Manifest, tmp_path)


# ---- JSON --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, LONG, "", "{", "\ud800"], ids=lambda text: ascii(text[:6]))
def test_json_that_cannot_be_had_is_a_value_error(text):
    one_line("", parse_json, text, kind=ValueError)


def test_nested_json_in_the_place_of_every_note(tmp_path):
    folder = write_jsonl(tmp_path / "jsonl", pickapic(n=2, size=8))
    (folder / "train.jsonl").write_text(f'{{"prompt": {DEEP}}}\n')
    one_line("line 1 is not JSON .*nested", open_pairs, folder)

    (tmp_path / "state.json").write_text(f'{{"files": {DEEP}}}')
    one_line("nested too deeply", checkpoint.load, tmp_path)
    recipe = Recipe("x", {}, (Field("score", (), "float64"),))
    (tmp_path / recipe.folder_name).mkdir()
    (tmp_path / recipe.folder_name / "shard-0-00000.json").write_text(signed(f'{{"keys":{DEEP}}}'))
    mend(tmp_path, recipe, ranks=0)
    assert kept_scores.read_scores(tmp_path, recipe) == {}

    (tmp_path / "hps").mkdir()
    (tmp_path / "hps" / "anime.json").write_text(DEEP)
    one_line("anime.json cannot be read", read_prompts, [f"hps={tmp_path / 'hps'}"])

    cache = tmp_path / "cache" / f"latents-{'0' * 16}"
    cache.mkdir(parents=True)
    (cache / "recipe.json").write_text(DEEP)
    ((_, fault),) = verify(tmp_path / "cache")
    assert "nested too deeply" in fault


def test_links_to_nowhere_and_without_an_end(tmp_path):
    recipe = Recipe("x", {}, (Field("score", (), "float64"),))
    (tmp_path / "scores" / recipe.folder_name).mkdir(parents=True)
    for number, target in enumerate(("nowhere", "/dev/zero")):
        (tmp_path / "scores" / recipe.folder_name / f"shard-0-{number:05d}.json").symlink_to(target)
    assert hub_revisions.revision_of(tmp_path).startswith("files ")
    mend(tmp_path / "scores", recipe, ranks=0)
    assert os.listdir(tmp_path / "scores" / recipe.folder_name) == ["recipe.json"]
    (tmp_path / "shard-0-00000.log").symlink_to("nowhere")
    assert log_keys(tmp_path) == set()
    notes = tmp_path / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "a.metadata").symlink_to("/dev/zero")  # all of it was read
    assert hub_revisions.revision_of(tmp_path).startswith("files ")


@pytest.mark.parametrize("shape", [["a"], [0], [-1], [2**40], [2**16, 2**16], 3, None], ids=str)
def test_a_recipe_of_records_without_a_size_is_refused(shape):
    field = {"name": "latents", "shape": shape, "dtype": "float32"}
    value = {"format": 1, "kind": "a", "facts": {}, "fields": [field]}
    one_line("fields|not a recipe", Recipe.from_json, value, kind=ValueError)


# ---- tables ------------------------------------------------------------------------------------------------------


def test_a_damaged_stream_is_named_as_damaged(tmp_path):
    path = write_table(tmp_path / "train.parquet", pickapic(n=4, size=32))
    data = bytearray(path.read_bytes())
    data[100:2000] = bytes(1900)  # a page, not the footer
    path.write_bytes(data)
    rows = open_pairs(path, streaming=True).rows()
    message = one_line("the stream broke off after 0 rows .*damaged: copy it again", list, rows)
    assert not isinstance(message, Unresponsive)


@pytest.mark.parametrize("change", ["cut", "header", "twice", "list"])
def test_a_damaged_relabelled_file_is_named(tmp_path, change):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = write_table(tmp_path / "pairs.parquet", {"caption": ["a"], "label_0": [1.0]})
    if change == "twice":
        table = pa.table([["a"], ["b"]], names=["caption", "caption"])
        pq.write_table(table.replace_schema_metadata({b"dpo_fast.relabel.digest": b"0"}), path)
    elif change == "list":
        pq.write_table(pq.read_table(path).replace_schema_metadata({NOTE: b"[1]"}), path)
        one_line("its note is no object", note_of, path, kind=Damaged)
        return
    else:
        path.write_bytes(path.read_bytes()[:-4] if change == "cut" else b"\xff" + path.read_bytes()[1:-9] + b"\xff" * 9)
    one_line("damaged|cannot be read", check_labels, path, kind=Damaged)


def test_a_column_of_prompts_that_are_no_texts_is_refused(tmp_path):
    path = write_table(tmp_path / "prompts.parquet", {"caption": [1, 2]})
    one_line("holds no texts", read_prompts, [f"pickapic-validation={path}"])


# ---- links -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("below", ["", "data"])
def test_a_snapshot_of_the_hub_is_read(tmp_path, streaming, below):
    """Every file is a link into the repository's blobs."""
    whole = write_jsonl(tmp_path / "whole", pickapic(n=3, size=16))
    repository = tmp_path / "datasets--x--y"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in whole.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number:040x}"
        blob.write_bytes(file.read_bytes())
        link = snapshot / below / file.relative_to(whole)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    for place in (snapshot / below, snapshot / below / "train.jsonl"):
        source = open_pairs(place, streaming=streaming)
        if streaming:
            assert all(isinstance(image, bytes) for row in source.rows() for image in row.images)
        else:
            assert len(build_index(source, seed=0, progress=False).train) == 3
    outside = tmp_path / "secret.jpg"
    outside.write_bytes((whole / "images" / "0-chosen.jpg").read_bytes())
    (snapshot / below / "images" / "0-chosen.jpg").unlink()
    (snapshot / below / "images" / "0-chosen.jpg").symlink_to(outside)
    source = open_pairs(snapshot / below)
    one_line("leads out of the folder", build_index, source, seed=0, progress=False)


@pytest.mark.parametrize("place", ["config.yaml", "summary.json", "metrics.jsonl", "pytorch_lora_weights.safetensors"])
def test_a_folder_in_the_place_of_a_file_of_a_run(tmp_path, place):
    (tmp_path / "config.yaml").write_text(signed_text("seed: 1\n"))
    write_signed_json(tmp_path / "summary.json", {"steps": 1, "result": {"pytorch_lora_weights.safetensors": "0"}})
    (tmp_path / place).unlink(missing_ok=True)
    (tmp_path / place).mkdir()
    try:
        run_folder.check_result(tmp_path)
    except BadInput as error:
        assert place in str(error)
    assert not run_folder.is_finished(tmp_path, 2, evaluated=False, uploaded=False)


# ---- the start of the commands -----------------------------------------------------------------------------------


def homeless(monkeypatch) -> None:
    """As in a container whose user has neither HOME nor an entry in passwd."""
    import pwd

    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_without_a_home_folder_no_folder_called_tilde_is_made(tmp_path, monkeypatch, capfd):
    homeless(monkeypatch)
    monkeypatch.chdir(tmp_path)
    one_line("set HOME", user_path, "~/.cache")
    one_line("set HOME", user_path, "~")
    assert user_path("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")
    assert cli.guarded(lambda: 0, kept="", go_on="") == 2
    said = capfd.readouterr().err
    assert said.startswith("dpo_fast: error: no home folder is known") and "--latent_cache_dir" in said
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.guarded(lambda: 0, kept="", go_on="") == 0
    assert user_path("~/x") == tmp_path / "x"


def test_a_name_that_an_ascii_locale_cannot_write(tmp_path):
    script = "import sys, pathlib; from dpo_fast.cli import guarded\n"
    script += "sys.exit(guarded(lambda: pathlib.Path('Z\\xfcrich').mkdir() or 0, kept='', go_on=''))"
    plain = {**environment(), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for changed, status in (({}, 2), ({"PYTHONUTF8": "1"}, 0)):
        done = subprocess.run(
            [sys.executable, "-c", script], env={**plain, **changed}, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        assert status == 0 or "'Z\\xfcrich' cannot be written in this locale, whose encoding is ascii" in done.stderr


@pytest.mark.parametrize("word", ["Z\udcfcrich", "--output_dir=Z\udcc3\udcbcrich", "\ud800"], ids=ascii)
def test_a_flag_that_is_no_utf_8(word):
    """What bytes become that the locale's encoding does not have; config.yaml could not be written with them."""
    one_line("is no text in this locale.*rename it|PYTHONUTF8", parse, ["--dataset_name", word])


def test_images_are_found_in_an_ascii_locale(tmp_path):
    """Their names in the JSONL are UTF-8, as they are on the disk."""
    columns = pickapic(n=1, size=16)
    folder = write_jsonl(tmp_path / "set", columns)
    for side in ("chosen", "rejected"):
        (folder / "images" / f"0-{side}.jpg").rename(folder / "images" / f"Zürich-{side}.jpg")
    text = (folder / "train.jsonl").read_text().replace("images/0-", "images/Zürich-")
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    script = "import sys; from dpo_fast.data import PairsSource, build_index, open_source\n"
    script += "assert sys.getfilesystemencoding() == 'ascii'\n"
    script += f"assert len(build_index(open_source(PairsSource({str(folder)!r})), seed=0, progress=False).train) == 1"
    plain = {**environment(), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wandb_without_a_key_is_said_at_once(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", None)
    one_line("wandb login.*WANDB_API_KEY.*WANDB_MODE=offline", parallel._check_keys, ["wandb"])
    one_line("wandb login", parallel._check_keys, ["all"])
    parallel._check_keys(["tensorboard"])
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled"), ("WANDB_API_KEY", "0" * 40)):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            parallel._check_keys(["wandb"])
    for file, text in {
        ".netrc": "machine api.wandb.ai login user password x",
        ".config/wandb/settings": "[default]\napi_key = x",
        "wandb/settings": "[default]\nmode = offline",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
        parallel._check_keys(["wandb"])
        (tmp_path / file).unlink()
    one_line("wandb login", parallel._check_keys, ["wandb"])


def test_a_tracker_that_cannot_be_started_is_one_line(monkeypatch, tmp_path):
    ranks = parallel.start("tensorboard")

    def fail(*_: object, **__: object) -> None:
        raise ConnectionResetError("no\nnetwork")

    monkeypatch.setattr(ranks.accelerator, "init_trackers", fail)
    match = "--report_to tensorboard: a tracker cannot be started .no network"
    one_line(match, ranks.start_trackers, tmp_path, "p", {})
