"""Which image of a folder is of which prompt, however people name files."""

from pathlib import Path
from unicodedata import normalize

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dpo_fast.errors import BadInput
from dpo_fast.evaluation.image_names import LEAST_CUT, PromptImage, file_stem, images_of
from dpo_fast.evaluation.prompts import read_prompts
from tests.helpers.runs import SAMPLE

PARTI = SAMPLE.parent / "PartiPrompts.tsv"
PROMPTS = ["a red fox", "Two cats & a dog!", "room 101", "雪の中の猫", "a" + " very" * 30 + " long road"]


def put(folder: Path, name: str, text: str | None = None) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    about = PngInfo()
    if text is not None:
        about.add_text("prompt", text)
    Image.new("RGB", (4, 4)).save(file, **({"pnginfo": about} if file.suffix == ".png" else {}))
    return file


def of(folder: Path, prompts: list[str]) -> dict[str, list[Path]]:
    return {prompt: [image.file for image in images] for prompt, images in images_of(folder, prompts).images.items()}


@pytest.mark.parametrize(
    "name, prompt",
    [
        ("a red fox.png", 0),
        ("A_Red-Fox.jpg", 0),
        ("a red fox-3.webp", 0),
        ("a red fox (12).png", 0),
        ("a red fox/0003.png", 0),
        ("set/a-red-fox/7.png", 0),
        ("animals/a red fox.png", 0),
        ("two-cats-a-dog.png", 1),
        (f"{file_stem(PROMPTS[1])}-5.png", 1),
        ("room 101.png", 2),
        ("room 101-2.png", 2),
        ("雪の中の猫.png", 3),
        (f"{file_stem(PROMPTS[3])}-0.png", 3),
        (f"{PROMPTS[4][: LEAST_CUT + 9]}.png", 4),
        (f"{file_stem(PROMPTS[4])}-0.png", 4),
        (f"{PROMPTS[4][: LEAST_CUT - 3]}.png", None),
        ("a red foxes.png", None),
        ("room.png", None),
        ("0003.png", None),
        ("notes.txt", None),
        (".hidden/a red fox.png", None),
    ],
)
def test_a_name_stands_for_a_prompt(tmp_path, name, prompt):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    file = put(tmp_path, name) if not name.endswith(".txt") else tmp_path / name
    file.touch()
    expected = {} if prompt is None else {PROMPTS[prompt]: [file]}
    assert of(tmp_path, PROMPTS) == expected


ACCENTED = [
    "a café in Zürich",
    "가나다 고양이",
    "İstanbul",
    "Straße",
    "plain fox",
    "x² + y",
    "ﬁn",
    "e\u0301\u0323 twice",
]


@pytest.mark.parametrize("asked", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("as_what", ["name", "number", "folder", "cut", "text", "generated", "stem"])
def test_composed_and_decomposed_letters_are_the_same(tmp_path, asked, stored, as_what):
    """A Mac's disk and the archives made on it have names decomposed; people type prompts composed."""
    long = [f"{prompt}, {'very ' * 20}" for prompt in ACCENTED]
    prompts = [normalize(asked, prompt) for prompt in (long if as_what == "cut" else ACCENTED)]
    files = {}
    for k, prompt in enumerate(prompts):
        text = normalize(stored, prompt)
        name = {
            "name": f"{text}.png",
            "number": f"{text} (2).jpg",
            "folder": f"{text}/0001.webp",
            "cut": f"{text[:60]}.png",
            "text": f"{k}.png",
            "generated": f"{file_stem(text)}-3.png",
            "stem": f"{file_stem(text)}-3.jpg",  # without the PNG's text
        }[as_what]
        files[prompt] = [put(tmp_path, name, text if as_what in ("text", "generated") else None)]
    assert of(tmp_path, prompts) == files


def test_the_text_of_a_png_tells_prompts_apart_that_are_composed_differently(tmp_path):
    both = [normalize("NFD", "café noir"), "café noir"]
    files = {prompt: [put(tmp_path, f"{file_stem(prompt)}-0.png", prompt)] for prompt in both}
    assert of(tmp_path, both) == files
    files[both[1]].append(put(tmp_path, f"{normalize('NFD', 'café noir')}-1.jpg"))
    assert of(tmp_path, both) == files


def test_other_characters_are_other_prompts(tmp_path):
    """What only compatibility forms or case folding make equal."""
    put(tmp_path, "x2 + y.png")
    put(tmp_path, "fin.png")
    put(tmp_path, "strasse.png")
    assert images_of(tmp_path, ACCENTED) == ({}, 3)


def test_names_of_generated_images_stay_what_they_were():
    """Earlier folders are gone on with: the digest is of the prompt as it is."""
    stems = {prompt: file_stem(prompt) for prompt in ("a red fox", "a café", "a cafe\u0301")}
    assert stems == {"a red fox": "a-red-fox", "a café": "a-caf-d52796f1", "a cafe\u0301": "a-cafe-7a0f185e"}


def test_images_come_in_the_order_of_their_numbers(tmp_path):
    names = ["a red fox-10.png", "a red fox-9.png", "a red fox.png", "room 101 (2).png", "room 101 (1).png", "x.png"]
    files = {name: put(tmp_path, name) for name in names}
    found = of(tmp_path, PROMPTS)
    assert found["a red fox"] == [files[name] for name in (names[2], names[1], names[0])]
    assert found["room 101"] == [files[names[4]], files[names[3]]]
    assert images_of(tmp_path, PROMPTS).unused == 1 and list(found) == ["a red fox", "room 101"]


def test_what_a_png_says_of_its_prompt_counts_before_its_name(tmp_path):
    file = put(tmp_path, "a red fox.png", "room 101")
    other = put(tmp_path, "whatever.png", PROMPTS[1])
    workflow = put(tmp_path, "a red fox-2.png", '{"3": {"class_type": "KSampler"}}')  # as ComfyUI has it
    assert of(tmp_path, PROMPTS) == {"a red fox": [workflow], PROMPTS[1]: [other], "room 101": [file]}


def test_a_name_of_two_prompts_is_refused_with_both(tmp_path):
    prompts = ["A red fox!", "a red fox?"]
    file = put(tmp_path, "a red fox.png")
    with pytest.raises(BadInput, match="could be of 'A red fox!' or of 'a red fox\\?'") as refused:
        images_of(tmp_path, prompts)
    file.rename(file.with_stem(file_stem(prompts[1])))
    assert file_stem(prompts[1]) in str(refused.value)
    assert list(of(tmp_path, prompts)) == [prompts[1]]


def test_a_prompt_that_is_a_number_takes_no_numbered_images_of_others(tmp_path):
    """PartiPrompts has the prompts 0, 42, 101 and 300."""
    prompts = ["0", *PROMPTS]
    if PARTI.is_file():
        prompts = [prompt.text for prompt in read_prompts([f"partiprompts={PARTI}"])]
    some = [*dict.fromkeys(["0", *prompts[:20]])]
    files = {prompt: [put(tmp_path, f"{file_stem(prompt)}/{k}.png") for k in (0, 1)] for prompt in some}
    files["0"].append(put(tmp_path, "0.png"))
    found = of(tmp_path, prompts)
    assert {prompt: sorted(images) for prompt, images in found.items()} == {p: sorted(files[p]) for p in some}


def test_what_is_generated_tells_its_seed(tmp_path):
    file = put(tmp_path, "x.png")
    about = PngInfo()
    for name, text in (("prompt", "a red fox"), ("seed", "17"), ("noise_seed", "5")):
        about.add_text(name, text)
    Image.new("RGB", (4, 4)).save(file, pnginfo=about)
    assert images_of(tmp_path, PROMPTS).images["a red fox"] == [PromptImage(file, 17)]
    about = PngInfo()
    about.add_text("workflow", "x" * (2 << 20), zip=True)  # more than PIL reads
    Image.new("RGB", (4, 4)).save(tmp_path / "a red fox.png", pnginfo=about)
    assert len(images_of(tmp_path, PROMPTS).images["a red fox"]) == 2
