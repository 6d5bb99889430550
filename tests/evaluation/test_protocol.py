"""The published protocol as one command: evaluations, simulated voters, the table."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpo_fast.checksums import Damaged, write_signed_json
from dpo_fast.errors import BadInput
from dpo_fast.evaluate import main
from dpo_fast.evaluation import protocol as protocol_
from dpo_fast.evaluation.evaluate_options import EvaluateConfig
from dpo_fast.evaluation.image_names import file_stem, prompt_of
from dpo_fast.evaluation.protocol import BASE, CLOSED_MODEL, _against, groups_of, remarks_of
from dpo_fast.evaluation.protocol_table import table_of
from dpo_fast.evaluation.sides import Side, sides_of
from dpo_fast.vote import main as vote_command
from dpo_fast.voting.folders import read_folders
from dpo_fast.voting.options import parse
from dpo_fast.voting.session import votes_file_of
from tests.helpers import scorer_files
from tests.helpers.runs import train
from tests.helpers.voters import session, vote

PARTI = "Prompt\tCategory\n" + "".join(
    f"{text}\t{category}\n"
    for text, category in (
        ("a cat on a mat", "Animals"),
        ("a <b>Dog</b>!", "Animals"),
        ("a woman with a hat", "People"),
        ("two men | a boat", "People"),
        ("a red hat", "Artifacts"),
    )
)
HPS = {
    "anime": ["a girl in the rain", "a blue castle"],
    "concept-art": ["a long bridge"],
    "paintings": ["fields of wheat"],
    "photo": ["a bowl of fruit"],
}
SCORERS = ("pickscore", "hpsv2", "clip", "aesthetic")


@pytest.fixture(scope="module")
def world(sdxl_path, pairs, tmp_path_factory) -> Path:
    """A run, the scorers' files, the prompt sets, folders of closed models' images, and layouts."""
    home = tmp_path_factory.mktemp("world")
    train(sdxl_path, pairs, home / "mine", "--learning_rate", 1e-2)
    scorer_files.write_all(home / "scorers")
    (home / "parti.tsv").write_text(PARTI)
    (home / "hps").mkdir()
    for style, texts in HPS.items():
        (home / "hps" / f"{style}.json").write_text(json.dumps(texts))
    images_for(["a cat on a mat", "two men | a boat", "a long bridge"], home / "mj")
    images_for(["a red hat"], home / "emu")
    images_for(["a fox in snow", "a tall tower"], home / "sketches")
    return home


def images_for(texts: list[str], folder: Path) -> None:
    folder.mkdir()
    for text in texts:
        pixels = np.random.randint(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{file_stem(text)}.png")


def protocol(world: Path, out: Path, *flags: object, status: int = 0) -> Path:
    argv = ["--protocol", "diffusion-dpo", "--policy", world / "mine", "--output_dir", out, "--sampling_steps", 2]
    argv += ["--resolution", 64] if "--resolution" not in flags else []
    if "--prompts" not in flags:
        argv += ["--prompts", f"partiprompts={world / 'parti.tsv'}", f"hps={world / 'hps'}"]
    argv += ["--scorer_models", world / "scorers"] if "--scorer_models" not in flags else []
    assert main([str(word) for word in (*argv, *flags)]) == status
    return out


def likes_policy(question: str, prompt: str, file: Path) -> float:
    """Prefers the policy's images in general, the other's by looks, and cannot tell which fits the text."""
    return {"general": 3.0, "appeal": -3.0, "alignment": 0.0}[question] * (file.parent.name == "mine")


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def test_from_one_command_to_the_table(world, tmp_path, capfd):
    scorers = ["aesthetic", "clip"]
    everything = [
        "--scorers",
        *scorers,
        "--closed",
        f"midjourney={world / 'mj'}",
        f"emu={world / 'emu'}",
        "--layout",
        world / "sketches",
    ]
    out = protocol(world, tmp_path / "out", *everything)
    said = capfd.readouterr().out
    names = [
        "base-partiprompts",
        "base-hps",
        "base-sdedit",
        "midjourney-partiprompts",
        "midjourney-hps",
        "emu-partiprompts",
    ]
    assert [group.name for group in groups_of(out)] == names
    assert all((out / name / "report.html").is_file() for name in names)
    assert "0 of 5 votes" in said and "nobody has voted: python -m dpo_fast.vote" in said
    assert "emu has no image of a prompt of hps" in said and "no images of" not in said and "no SDEdit" not in said

    # images are made once, of each model and prompt: 5 + 5 + 2 prompts, and none where others' images are compared
    made = sorted(path.relative_to(out).parts[:3:2] for path in out.glob("*/images/*/*.png"))
    assert len(made) == 2 * (5 + 5 + 2) and {name for name, _ in made} == set(names[:3])
    assert {path.name for path in (out / "base-sdedit/images/mine").iterdir()} == {
        f"{file_stem(text)}-0.png" for text in ("a fox in snow", "a tall tower")
    }
    texts = Image.open(out / "base-sdedit/images/mine/a-fox-in-snow-0.png").text
    assert texts["layout"] == "a-fox-in-snow.png" and texts["strength"] == "0.6"

    rows = {row["name"]: row for row in summary(out)["rows"]}
    assert list(rows) == [
        "base, partiprompts", "base, partiprompts, people", "base, hps", "base, hps, people",
        "base, SDEdit from layouts", "midjourney, partiprompts", "midjourney, partiprompts, people",
        "midjourney, hps", "emu, partiprompts",
    ]  # fmt: skip
    assert [row["prompts"] for row in rows.values()] == [5, 2, 5, 1, 2, 2, 1, 1, 1]
    for name in names:
        scores, row = summary(out / name)["scores"], next(row for row in rows.values() if row["group"] == name)
        assert list(row["scorers"]) == list(scores) == scorers
        for scorer, of in scores.items():
            assert row["scorers"][scorer]["win_rate"] == of["win_rate"]["rate"]
            assert row["scorers"][scorer]["ci95"] == [of["win_rate"]["low"], of["win_rate"]["high"]]
        assert row["published"] is None  # another base than the published one

    session(out / "votes.sqlite", read_folders([out]).comparisons)
    number = vote(out / "votes.sqlite", {f"voter {k}": likes_policy for k in range(7)})
    assert number == 16 * 3 * 5  # every comparison and question gets its five votes
    assert vote_command(["results", str(out / "votes.sqlite")]) == 0
    assert "win rates of mine [95%]" in capfd.readouterr().out
    rows = {row["name"]: row for row in summary(out)["rows"]}
    for row in rows.values():
        general, appeal, _ = row["people"].values()
        assert general["lacking"] is appeal["lacking"] is None
        assert general["win_rate"] > 0.8 > 0.2 > appeal["win_rate"]
        assert general["ci95"][0] < general["win_rate"] <= general["ci95"][1]
    assert summary(out / "base-hps")["people"]["votes"] == 5 * 3 * 5

    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.png")}
    protocol(
        world, out, "--scorers", *scorers
    )  # what was evaluated before stays; the same table comes from the command
    said = capfd.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.png")} == before
    assert {row["name"] for row in summary(out)["rows"]} == set(rows)
    assert "votes" not in " ".join(summary(out)["missing"])
    for text in (said, (out / "table.md").read_text()):
        assert all(f"{rows[name]['people']['general']['win_rate']:.3f} [" in text for name in rows)
    markdown = (out / "table.md").read_text()
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    page = (out / "report.html").read_text()
    assert 'href="base-partiprompts/report.html"' in page and "general" in page and "<script" not in page


def test_what_is_missing_is_named(world, tmp_path, capfd, monkeypatch):
    scorers = shutil.copytree(world / "scorers", tmp_path / "scorers")
    shutil.rmtree(scorers / "yuvalkirstain")
    given = ["--prompts", f"partiprompts={world / 'parti.tsv'}", "--max_prompts", 2, "--scorer_models", scorers]
    out = protocol(world, tmp_path / "out", *given)
    missing = summary(out)["missing"]
    for line in (
        "nobody has voted: python -m dpo_fast.vote",
        "not scored by pickscore: ",
        "hps is not evaluated: --prompts hps",
        "no images of Midjourney: --closed midjourney=FOLDER",
        "no images of Emu",
        "no SDEdit: --layout FOLDER",
    ):
        assert sum(one.startswith(line) for one in missing) == 1, (line, missing)
    said = " ".join(capfd.readouterr().out.split())
    assert all(one in said for one in missing[2:])
    (row,) = summary(out)["rows"][:1]
    assert row["prompts"] == 2 and list(row["scorers"]) == list(SCORERS[1:])  # the paper's, in its order
    session(out / "votes.sqlite", read_folders([out]).comparisons)
    vote(out / "votes.sqlite", {"one": likes_policy}, most=1)
    cells = [*table_of(out).rows[0].people.values()]
    (begun,) = (str(cell) for cell in cells if cell.rate is not None)
    assert begun.endswith("] 0 of 2")  # one vote of five on one of two prompts
    assert [str(cell) for cell in cells if cell.rate is None] == ["0 of 5 votes"] * 2


@pytest.mark.parametrize("how", ["no files", "asked"])
def test_votes_alone_make_the_table(world, tmp_path, capfd, how):
    flags = ["--scorers", "people"] if how == "asked" else ["--scorer_models", tmp_path]
    flags += ["--prompts", f"partiprompts={world / 'parti.tsv'}", "--max_prompts", 2]
    flags += ["--closed", f"midjourney={world / 'mj'}"]
    out = protocol(world, tmp_path / "out", *flags)
    assert votes_file_of(parse([str(out)])) == out / "votes.sqlite"
    session(out / "votes.sqlite", read_folders([out]).comparisons, votes=1)
    assert vote(out / "votes.sqlite", {"one": likes_policy}) == 3 * 3
    capfd.readouterr()
    assert vote_command(["results", str(out / "votes.sqlite")]) == 0
    said, found = capfd.readouterr().out, summary(out)
    assert [list(row["scorers"]) for row in found["rows"]] == [[]] * len(found["rows"])
    assert all(row["people"]["general"]["win_rate"] is not None for row in found["rows"]) and "pickscore  " not in said
    named = (
        ["no scores, as --scorers people asked for votes alone"]
        if how == "asked"
        else [f"not scored by {name}: " for name in SCORERS]
    )
    assert all(any(line.startswith(one) for line in found["missing"]) for one in named)
    if how == "no files":  # once they are there, the same command scores
        protocol(world, out, *flags[2:])
        assert list(summary(out)["rows"][0]["scorers"]) == list(SCORERS)
        assert summary(out / "base-partiprompts")["people"]["votes"] == 6


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompts", "shapes"], "--prompts shapes is no set of the protocol diffusion-dpo: name partiprompts or hps"),
        (["--slice", "people"], "--slice people: the protocol reports the people slice anyway"),
        (["--dataset_name", "x.parquet"], "--dataset_name (x.parquet) is no part of the protocol"),
        (["--closed", "midjourney"], "--closed midjourney must be NAME=FOLDER"),
        (["--closed", "base={mj}"], "the name base is taken"),
        (["--closed", "a={mj}", "A={mj}"], "the name A is taken"),
        (["--closed", "mj=/nowhere"], "--closed mj=/nowhere is no folder"),
        (["--closed", "mj={sketches}"], "holds no image of a prompt of partiprompts or hps"),
        (["--layout", "/nowhere"], "--layout /nowhere does not exist"),
        (["--scorers", "people", "clip"], "--scorers people clip: people stands alone"),
        (["--layout", "{sketches}", "--baseline", "{mj}"], "--layout: both sides of SDEdit are generated"),
        (["--scorers", "beauty"], "there is no scorer 'beauty'"),
        (["--prompts", "hps=/nowhere"], "hps=/nowhere"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(world, tmp_path, capfd, flags, message):
    flags = [flag.format(mj=world / "mj", sketches=world / "sketches") for flag in flags]
    protocol(world, tmp_path / "out", *flags, status=2)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert message in line and not (tmp_path / "out").exists()


def test_images_are_compared_with_none_of_the_flags_of_generation(tmp_path):
    for folder in (tmp_path / "mine", tmp_path / "mj"):
        images_for(["a fox"], folder)
    shared = EvaluateConfig(policy="mine", max_token_length=225, sampling_steps=2, resolution=64, is_turbo=True)
    mine = Side("mine", tmp_path / "mine")
    config = _against(shared, tmp_path, mine, tmp_path / "mj", str(tmp_path / "prompts.txt"), "hps")
    assert [side.folder for side in sides_of(config)[1]] == [tmp_path / "mj", tmp_path / "mine"]


def test_a_closed_model_is_known_by_its_name_in_any_case(tmp_path):
    names = ("Midjourney-hps", "base-hps")
    kinds = (CLOSED_MODEL, BASE)
    groups = [{"name": n, "folder": n, "kind": kind, "people": []} for n, kind in zip(names, kinds, strict=True)]
    for name in names:
        (tmp_path / name).mkdir()
        for file in ("evaluation.json", "scores.parquet"):
            (tmp_path / name / file).touch()
    write_signed_json(tmp_path / "protocol.json", {"protocol": "diffusion-dpo", "groups": groups, "remarks": []})
    lines = " ".join(remarks_of(tmp_path))
    assert "no images of Midjourney" not in lines and "no images of Emu" in lines


def test_fewer_prompts_leave_each_layout_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol_, "sides_of", lambda config: ({}, (Side("base"), Side("mine"))))
    monkeypatch.setattr(protocol_, "scoring_of", lambda config, run: {"where": None})
    monkeypatch.setattr(protocol_, "batch_size_of", lambda config, run: 1)
    images_for(["1", "2", "3"], tmp_path / "layouts")
    (tmp_path / "layouts" / "prompts.txt").write_text("a fox\na tower\na bridge\n")
    (tmp_path / "parti.tsv").write_text(PARTI)
    given = {"prompts": (f"partiprompts={tmp_path / 'parti.tsv'}",), "layout": tmp_path / "layouts", "max_prompts": 2}
    config = EvaluateConfig(
        policy="mine", protocol="diffusion-dpo", scorers=("people",), output_dir=tmp_path / "out", **given
    )
    of_set, of_layouts = protocol_.begin(config, None).parts
    assert (of_set.config.max_prompts, of_layouts.config.max_prompts) == (2, None)
    assert of_layouts.config.prompts == (str(tmp_path / "layouts" / "prompts.txt"),)


def test_flags_of_a_protocol_alone(world, capfd):
    assert main(["--policy", str(world / "mine"), "--closed", f"mj={world / 'mj'}"]) == 2
    assert "--closed is of a protocol: add --protocol diffusion-dpo" in capfd.readouterr().err


@pytest.mark.parametrize(
    "name, prompt",
    [
        ("a fox in snow.png", "a fox in snow"),
        ("a_fox-in_snow.jpg", "a fox in snow"),
        ("a t-shirt on a line-2.png", "a t-shirt on a line"),
        ("fox (3).png", "fox"),
        ("7.png", "7"),
    ],
)
def test_the_prompt_that_a_name_states(tmp_path, name, prompt):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert prompt_of(tmp_path / name, tmp_path) == prompt


def test_a_damaged_record_is_refused(tmp_path):
    write_signed_json(tmp_path / "protocol.json", {"protocol": "diffusion-dpo", "groups": [], "remarks": []})
    assert groups_of(tmp_path) == []
    text = (tmp_path / "protocol.json").read_text()
    (tmp_path / "protocol.json").write_text(text.replace("remarks", "remarkt"))
    with pytest.raises(Damaged, match=r"protocol.json cannot be read or is damaged"):
        groups_of(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(BadInput, match="is not the folder of a protocol"):
        groups_of(tmp_path)
