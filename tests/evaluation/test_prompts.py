"""Prompts from texts, files and the published sets, in the files that the hub has."""

import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_fast.errors import BadInput
from dpo_fast.evaluation.prompts import HPS_STYLES, Prompt, Where, read_lines, read_prompts

PARTI = Path(__file__).parents[3] / "shared" / "data" / "PartiPrompts.tsv"


def texts(*given: object, **more) -> list[str]:
    return [prompt.text for prompt in read_prompts([str(one) for one in given], **more)]


def in_hub_cache(root: Path, repository: str, files: dict[str, str]) -> Where:
    """A cache folder as the hub's client leaves it, which it reads without the network."""
    home = root / f"datasets--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    for name, text in files.items():
        path = home / "snapshots" / ("0" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Where(cache_dir=str(root))


@pytest.fixture(scope="session")
def parti() -> Path:
    if not PARTI.is_file():
        pytest.skip(f"the real PartiPrompts are not here: {PARTI}")
    return PARTI


@pytest.fixture
def hps(tmp_path) -> dict[str, list[str]]:
    return {style: [f"{style} of {random.random()}" for _ in range(3)] for style in HPS_STYLES}


def test_texts_and_files_in_the_order_given(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n  two  \n", encoding="utf-8")
    found = read_prompts(["a cat", str(tmp_path / "p.txt"), " a dog "])
    assert found == [
        Prompt("a cat", "text"),
        Prompt("one", "p.txt"),
        Prompt("two", "p.txt"),
        Prompt("a dog", "text"),
    ]
    long = "a very " * 100 + "long prompt"
    assert texts(long) == [long]  # longer than any file's name


def test_the_real_partiprompts(parti):
    found = read_prompts([f"partiprompts={parti}"])
    assert len(found) == 1632 == len({prompt.text for prompt in found})
    categories, challenges = (Counter(getattr(p, name) for p in found) for name in ("category", "challenge"))
    assert len(categories) == 12 and categories["People"] == 177 and categories["Abstract"] == 51
    assert len(challenges) == 11 and challenges["Writing & Symbols"] == 91
    assert any('"PEACE"' in prompt.text for prompt in found)  # its quotation marks are letters
    people = read_prompts([f"partiprompts={parti}"], people=True)
    assert [p for p in found if p.category == "People"] == people
    assert [p._replace(source="partiprompts") for p in read_prompts([str(parti)])] == found


def test_partiprompts_from_the_hub(tmp_path):
    table = 'Prompt\tCategory\tChallenge\tNote\na "red" cat\tAnimals\tBasic\t\nbond\tAbstract\tBasic\tan "open quote\n'
    where = in_hub_cache(tmp_path, "nateraw/parti-prompts", {"PartiPrompts.tsv": table})
    expected = [
        Prompt('a "red" cat', "partiprompts", "Animals", "Basic"),
        Prompt("bond", "partiprompts", "Abstract", "Basic"),
    ]
    assert read_prompts(["partiprompts"], where=where) == expected


def test_hps_from_the_hub_and_from_a_copy(tmp_path, hps):
    files = {f"benchmark/{style}.json": json.dumps(prompts) for style, prompts in hps.items()}
    found = read_prompts(["hps"], where=in_hub_cache(tmp_path, "zhwang/HPDv2", files))
    assert found == [Prompt(text, "hps", style) for style in HPS_STYLES for text in hps[style]]
    copy = tmp_path / "datasets--zhwang--HPDv2" / "snapshots" / ("0" * 40)
    assert read_prompts([f"hps={copy}"]) == found == read_prompts([f"hps={copy / 'benchmark'}"])


def test_pickapics_validation_captions_once_each(tmp_path):
    captions = [f"caption {k % 5}" for k in range(7)]
    (tmp_path / "data").mkdir()
    for split, rows in (("validation_unique", captions), ("train", ["another"])):
        table = pa.table({"caption": rows, "jpg_0": [b"x"] * len(rows), "label_0": [1.0] * len(rows)})
        pq.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001-0a1b2c3d.parquet")
    found = read_prompts([f"pickapic-validation={tmp_path}"])
    assert found == [Prompt(f"caption {k}", "pickapic-validation") for k in range(5)]
    (file,) = (tmp_path / "data").glob("validation*")
    assert read_prompts([f"pickapic-validation={file}"]) == found


def test_without_unique_validation_prompts_they_are_the_distinct_ones_of_validation(tmp_path):
    """Some copies of Pick-a-Pic have only train, validation and test."""
    (tmp_path / "data").mkdir()

    def put(split: str, captions: list[str]) -> None:
        table = pa.table({"caption": captions, "label_0": [1.0] * len(captions)})
        pq.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001-0a1b2c3d.parquet")

    put("train", ["another"])
    with pytest.raises(BadInput, match=r"^[^\n]* has no split validation_unique or validation, only train: [^\n]*$"):
        read_prompts([f"pickapic-validation={tmp_path}"])
    put("validation", ["a", "b", "a ", "b", "", "c"])
    found = read_prompts([f"pickapic-validation={tmp_path}"])
    assert found == [Prompt(text, "pickapic-validation (split validation)") for text in "abc"]
    put("validation_unique", ["b", "a"])
    assert texts(f"pickapic-validation={tmp_path}") == ["b", "a"]


def test_pickapics_repository_can_be_named(tmp_path, monkeypatch):
    """Also that of version 1 and copies without images; the source says which."""
    asked = []

    def load_dataset(name: str, **options: object) -> dict[str, list[dict[str, str]]]:
        asked.append((name, options["columns"]))
        return {"train": [], "validation_unique": [{"caption": "a"}, {"caption": "b"}]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert read_prompts(["pickapic-validation"]) == [Prompt(text, "pickapic-validation") for text in "ab"]
    first = read_prompts(["pickapic-validation=yuvalkirstain/pickapic_v1"])
    assert first[0] == Prompt("a", "pickapic-validation of yuvalkirstain/pickapic_v1")
    assert asked == [("yuvalkirstain/pickapic_v2", ["caption"]), ("yuvalkirstain/pickapic_v1", ["caption"])]


def test_the_built_in_captions():
    found = texts("shapes")
    assert len(found) == 72 and all(" on a " in text for text in found)
    assert texts("shapes", most=7) == [found[k * 72 // 7] for k in range(7)]
    assert texts("shapes", most=100) == found


def test_people_are_words_where_no_category_says_it():
    about = ["a Woman with a hat", "two men.", "the king's crown", "a child"]
    others = [
        "a mango tree",
        "a humane society",
        "see you man\u0303ana",
        "a kide\u0301 and the kidé of ants",
    ]  # decomposed
    both = [text for pair in zip(about, others, strict=True) for text in pair]
    assert texts(*both, people=True) == about


@pytest.mark.parametrize(
    "given, said",
    [
        ([], "no prompt is named"),
        (["drawbench"], "drawbench is no set (partiprompts, hps"),
        (["two words.txt"], "no file"),
        (["nowhere/prompts.tsv"], "no file"),
        (["hps=/nowhere"], "holds no anime.json"),
        (["pickapic-validation=/nowhere"], "does not exist"),
        (["partiprompts=/nowhere"], "cannot be read"),
        (["shapes=/nowhere"], "built in"),
        (["empty.txt"], "holds no prompt"),
        (["empty.tsv"], "must name the columns Prompt, Category"),
        (["blank.tsv"], "column Prompt is empty"),
        (["binary.txt"], "cannot be read"),
        (["hps=."], "is no list of texts"),
        (["partiprompts"], "--prompts partiprompts=PATH"),  # the hub cannot be reached
        (["pickapic-validation"], "--prompts pickapic-validation=PATH"),
    ],
)
def test_what_is_refused_says_so_in_one_line(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("empty.tsv").write_text("")
    Path("blank.tsv").write_text("Prompt\tCategory\n\tAnimals\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("anime.json").write_text("[1]")
    with pytest.raises(BadInput) as refused:
        read_prompts(given, where=Where(cache_dir=str(tmp_path)))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_slice_of_nothing_is_refused():
    with pytest.raises(BadInput, match="leaves no prompt"):
        read_prompts(["a red cube", "shapes"], people=True)


def test_lines_of_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n  two  \n", encoding="utf-8")
    assert read_lines(tmp_path / "p.txt", "--eval_prompts") == ["one", "two"]
    (tmp_path / "p.txt").write_text(" \n")
    with pytest.raises(BadInput, match=r"--eval_prompts .* holds no prompt"):
        read_lines(tmp_path / "p.txt", "--eval_prompts")
