"""The scorers from published models: tiny ones of their architectures, in the published files, against plain code."""

import gzip
import html
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPModel, CLIPTokenizer

from dpo_fast import scorers
from dpo_fast.errors import BadInput
from dpo_fast.scorers import MODULE_OF, Scorer, aesthetic, cleaning, facts, hpsv2, imagereward, load_scorer, provenance
from dpo_fast.scorers.clip_models import VIT_H, VIT_L
from dpo_fast.scorers.published import of_model
from tests.helpers import scorer_files
from tests.helpers.pipelines import randomise
from tests.helpers.plain_models import OpenClip

WITHOUT_FILES = ("shapes",)  # modules of scorers that load none
NAMES = [name for name, module in MODULE_OF.items() if module not in WITHOUT_FILES]
# What a score's terms add up to, however much of it cancels: 100, or the logit scale, times those of a cosine.
TERMS = {name: {"pickscore": 4.0, "clip": 100.0, "hpsv2": 100.0, "hpsv2.1": 100.0}.get(name, 1.0) for name in NAMES}
ROUNDING = 32 * torch.finfo(torch.float32).eps  # of these; two towers in fp32 were 1 to 9 ulp off in 12 x 72 scores
PROMPTS = ["a cat", "", "A Dog, in the RAIN!", "x" * 100 + " y", "two hats & a \u2019coat\u2019 &amp;amp; caf\u00e9"]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, dict[str, torch.nn.Module]]:
    """A folder with all repositories, and the models whose weights are in it."""
    folder = tmp_path_factory.mktemp("published")
    return folder, scorer_files.write_all(folder)


@pytest.fixture(autouse=True)
def small_imagereward(monkeypatch):
    monkeypatch.setattr(imagereward, "VISION", scorer_files.small_vision())


def images_for(prompts: list[str], height: int = 45, width: int = 37) -> torch.Tensor:
    blocks = torch.rand(len(prompts), 3, 5, 5)
    return (torch.nn.functional.interpolate(blocks, (height, width)) * 255).round().byte()


def load(published, name: str, **settings: object) -> Scorer:
    return load_scorer(name, where=published[0], **settings)


# plain computations of every score, in fp64


def processed(images: torch.Tensor) -> torch.Tensor:
    """By transformers' own processor, as the published recipes of PickScore and CLIP have it."""
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = kind(size={"shortest_edge": scorer_files.SIZE}, crop_size=scorer_files.SIZE)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    return processor(pictures, return_tensors="pt").pixel_values.double()


def cropped(images: torch.Tensor) -> torch.Tensor:
    """Resize(SIZE, bicubic) and CenterCrop(SIZE) of torchvision, for pictures that are higher than wide."""
    size = scorer_files.SIZE
    height, width = images.shape[-2:]
    assert height >= width
    resized = []
    for image in images:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        resized.append(np.asarray(picture.resize((size, int(size * height / width)), Image.Resampling.BICUBIC)))
    top = round((resized[0].shape[0] - size) / 2)
    return normalised(torch.from_numpy(np.stack(resized)[:, top : top + size] / 255).permute(0, 3, 1, 2))


def padded(images: torch.Tensor) -> torch.Tensor:
    """HPSv2's ResizeMaxSize, for pictures that are higher than wide."""
    size = scorer_files.SIZE
    width = round(images.shape[-1] * size / images.shape[-2])
    pixels = torch.nn.functional.interpolate(images.double() / 255, (size, width), mode="bicubic", antialias=True)
    left = (size - width) // 2
    return normalised(torch.nn.functional.pad(pixels, (left, size - width - left)))


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return (pixels - torch.tensor(mean)[:, None, None].double()) / torch.tensor(std)[:, None, None].double()


def by_hand(prompts: list[str]) -> list[str]:
    """What OpenAI's CLIP and open_clip do to PROMPTS before their tokens."""
    return [html.unescape(html.unescape(p)).replace("\u2019", "'") for p in prompts]


def expected_scores(published, name: str, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    folder, models = published
    model = models[name]
    if name in ("pickscore", "clip"):
        words = AutoTokenizer.from_pretrained(folder / (VIT_H if name == "pickscore" else VIT_L))
        tokens = words(
            prompts if name == "pickscore" else by_hand(prompts),
            padding=True,
            truncation=True,
            max_length=77,
            return_tensors="pt",
        )
        scores = model(pixel_values=processed(images), **tokens).logits_per_image.diagonal()
        return scores if name == "pickscore" else 100 * scores / model.logit_scale.exp()
    if name.startswith("hpsv2"):
        words = AutoTokenizer.from_pretrained(folder / VIT_H)
        clean = by_hand(prompts)
        tokens = torch.zeros(len(prompts), 77, dtype=torch.int64)  # open_clip's padding
        for row, ids in enumerate(words(clean, truncation=True, max_length=77).input_ids):
            tokens[row, : len(ids)] = torch.tensor(ids)
        of_images, of_texts = model(padded(images), tokens)
        return 100 * (of_images @ of_texts.T).diagonal()
    if name == "aesthetic":
        clip = models["clip"]
        found = clip.visual_projection(clip.vision_model(pixel_values=cropped(images)).pooler_output)
        return model.layers(found / found.norm(dim=1, keepdim=True))[:, 0]
    words = AutoTokenizer.from_pretrained(folder / imagereward.TOKENIZER)
    tokens = words(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    return (model(cropped(images), tokens.input_ids, tokens.attention_mask) - 0.16717362830052426) / 1.0333394966054072


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(45, 37), (64, 64), (31, 28), (28, 28)], ids=str)
def test_scores_are_the_published_ones(published, name, shape):
    images = images_for(PROMPTS, *shape)
    scores = load(published, name).score(images, PROMPTS)
    assert scores.dtype == torch.float64 and scores.shape == (len(PROMPTS),) and scores.device.type == "cpu"
    expected = expected_scores(published, name, images, PROMPTS)
    assert expected.std() > 1e-3  # else anything would pass
    assert (scores - expected).abs().max() <= ROUNDING * TERMS[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_only_a_batch(published, name):
    prompts = [f"{word} {k}" for k in range(4) for word in PROMPTS[:3]]
    images = images_for(prompts)
    scorer = load(published, name)
    scores = scorer.score(images, prompts)
    assert torch.equal(scores, scorer.score(images, prompts))
    for size in (1, 5):
        parts = [scorer.score(images[k : k + size], prompts[k : k + size]) for k in range(0, len(prompts), size)]
        torch.testing.assert_close(torch.cat(parts), scores, rtol=0, atol=ROUNDING * TERMS[name])
    backwards = scorer.score(images.flip(0), prompts[::-1])
    torch.testing.assert_close(backwards.flip(0), scores, rtol=0, atol=ROUNDING * TERMS[name])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_near(published, name, dtype):
    prompts = PROMPTS * 6  # of a few images all scores may lie near 0
    images = images_for(prompts)
    scores = load(published, name).score(images, prompts)
    half = load(published, name, dtype=dtype).score(images, prompts)
    assert 0 < (half - scores).abs().max() < (0.02 if dtype == torch.float16 else 0.1) * scores.abs().max()


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "clip"])
def test_long_prompts_are_cut_after_77_tokens(published, name):
    images = images_for([""]).expand(4, -1, -1, -1)
    long, longer, short, shorter = load(published, name).score(images, ["x" * 100, "x" * 3000, "x" * 70, "x" * 69])
    assert long == longer and len({long.item(), short.item(), shorter.item()}) == 3


def test_imagereward_reads_35_tokens(published):
    images = images_for([""]).expand(3, -1, -1, -1)
    long, longer, short = load(published, "imagereward").score(images, ["x" * 40 + "y", "x" * 40 + "z", "x" * 32])
    assert long == longer != short


def test_the_aesthetic_score_knows_no_prompt(published):
    images = images_for(PROMPTS)
    scorer = load(published, "aesthetic")
    assert torch.equal(scorer.score(images, PROMPTS), scorer.score(images, PROMPTS[::-1]))


def test_from_the_hub_as_from_a_folder(published, tmp_path):
    """In the layout of the hub's cache, which is read without a connection."""
    for repository in (hpsv2.REPOSITORY, VIT_H, VIT_L, aesthetic.REPOSITORY):
        cached = tmp_path / f"models--{repository.replace('/', '--')}"
        shutil.copytree(published[0] / repository, cached / "snapshots" / "abc")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("abc")
    images = images_for(PROMPTS)
    for name in ("hpsv2", "clip", "aesthetic"):
        scores = load_scorer(name, cache_dir=str(tmp_path)).score(images, PROMPTS)
        assert torch.equal(scores, load(published, name).score(images, PROMPTS))
    with pytest.raises(BadInput, match=r"^the files of [^\n]*PickScore_v1 cannot be fetched[^\n]*connection[^\n]*$"):
        load_scorer("pickscore", cache_dir=str(tmp_path))
    with pytest.raises(BadInput, match=r"^ImageReward.pt of zai-org/ImageReward cannot be fetched[^\n]*$"):
        load_scorer("imagereward", cache_dir=str(tmp_path))


# what a scorer is


@pytest.mark.parametrize("name", MODULE_OF)
def test_the_repositories_named_are_all_that_is_read(published, name, tmp_path):
    repositories = scorers._module(name).REPOSITORIES[name]
    for repository in repositories:
        shutil.copytree(published[0] / repository, tmp_path / repository)
    load_scorer(name, where=tmp_path)
    assert bool(repositories) == (name in NAMES)
    for repository in repositories:  # each is read
        (tmp_path / repository).rename(tmp_path / "away")
        with pytest.raises(BadInput, match=repository):
            load_scorer(name, where=tmp_path)
        (tmp_path / "away").rename(tmp_path / repository)


@pytest.mark.parametrize("name", NAMES)
def test_other_files_are_another_scorer(copied, name):
    def now(**settings: object) -> dict[str, str]:
        return facts(name, where=copied, **settings)

    before = now()
    assert now() == facts(name, where=str(copied)) == before and before["scorer"] == name
    assert now(dtype=torch.bfloat16) == {**before, "dtype": "bfloat16"} and before["dtype"] == "float32"
    for repository in scorers._module(name).REPOSITORIES[name]:
        path = next(path for path in (copied / repository).iterdir() if path.suffix in (".pt", ".pth", ".json"))
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert (touched := now()["files"]) != before["files"]
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert now() == before
        path.write_bytes(path.read_bytes() + b" ")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert now()["files"] not in (touched, before["files"])
        before = now()
        notes = copied / repository / ".cache" / "huggingface"  # what `hf download --local-dir` writes at every call
        notes.mkdir(parents=True)
        (notes / "a.metadata").write_text("now")
        (copied / "some" / repository).mkdir(parents=True)
        (copied / "some" / repository / "else.bin").write_text("of another")
        assert now() == before
    shutil.move(copied, copied.with_name("moved"))
    assert facts(name, where=copied.with_name("moved")) == before


def test_of_the_hub_the_commits_are_what_a_scorer_is(tmp_path, monkeypatch):
    def now(name: str) -> str:
        return facts(name, cache_dir=str(tmp_path))["files"]

    assert now("clip") == f"{VIT_L}@not fetched" and now("appeal") == "none"
    for repository, commit in ((VIT_L, "abc\n"), (VIT_H, "def")):
        refs = tmp_path / f"models--{repository.replace('/', '--')}" / "refs"
        refs.mkdir(parents=True)
        (refs / "main").write_text(commit)
    assert now("clip") == f"{VIT_L}@abc" and now("hpsv2") == f"xswu/HPSv2@not fetched, {VIT_H}@def"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert facts("clip")["files"] == f"{VIT_L}@abc"
    with pytest.raises(BadInput, match="there is no scorer 'beauty'"):
        facts("beauty")


def test_a_model_gets_the_whole_batch_and_no_gradient():
    weight, given = torch.ones((), requires_grad=True), []

    def compute(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        given.append(len(images))
        return weight * images.float().mean((1, 2, 3))

    images = images_for(["a"] * 40)
    scores = of_model(compute).score(images, ["a"] * 40)
    torch.testing.assert_close(scores, images.double().mean((1, 2, 3)))
    assert given == [40] and scores.dtype == torch.float64 and not scores.requires_grad


# files that cannot be used


@pytest.fixture
def copied(published, tmp_path) -> Path:
    return Path(shutil.copytree(published[0], tmp_path / "copy"))


def refused(folder: Path, name: str, match: str) -> None:
    with pytest.raises(BadInput, match=match) as caught:
        load_scorer(name, where=folder)
    assert "\n" not in str(caught.value)


PICKLED = [
    ("hpsv2", hpsv2.REPOSITORY, hpsv2.FILES["hpsv2"]),
    ("aesthetic", aesthetic.REPOSITORY, aesthetic.FILE),
    ("imagereward", imagereward.REPOSITORY, "ImageReward.pt"),
]


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(("name", "repository", "file"), PICKLED)
def test_a_pickle_with_code_is_refused_and_not_run(copied, tmp_path, name, repository, file):
    path = copied / repository / file
    torch.save({**torch.load(path, weights_only=True), "more": Code(tmp_path / "ran")}, path)
    refused(copied, name, "holds more than weights and could run code")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("name", "repository", "file"), PICKLED)
def test_a_file_of_weights_that_is_another(copied, name, repository, file):
    path = copied / repository / file
    whole = torch.load(path, weights_only=True)
    state = whole["state_dict"] if name == "hpsv2" else whole
    key = next(key for key in state if key.endswith("weight") and state[key].ndim == 2)

    def save(changed: object) -> None:
        torch.save({"state_dict": changed} if name == "hpsv2" else changed, path)

    save({k: t for k, t in state.items() if k != key})
    refused(copied, name, r"is not the published file: (1 tensor is|3 tensors are) missing \([^)]*weight\)")
    for wrong in ({}, {**state, key: state[key][:-1]}):
        save(wrong)
        refused(copied, name, "is not the published file")
    save({**state, "more.weight": torch.zeros(2)})
    if name != "imagereward":  # which its authors load with strict=False
        refused(copied, name, r"1 tensor is unexpected \(more\.weight\)")
    for wrong in ([state[key]], {**state, key: "text"}, {**state, key: None}):
        save(wrong)
        refused(copied, name, "is not the published file")
    for content in (b"", path.read_bytes()[:1000], b"<html>not found</html>"):
        path.write_bytes(content)
        refused(copied, name, "is not the published file|could run code")
    path.unlink()
    refused(copied, name, f"is no file: hf download {repository} ")
    shutil.rmtree(path.parent)
    refused(copied, name, f"is no folder: hf download {repository} --local-dir ")


def test_of_imagereward_what_is_not_used_may_be_more_or_less(copied, published):
    """Its authors load it with strict=False: files saved by other versions hold other buffers and heads."""
    path = copied / imagereward.REPOSITORY / "ImageReward.pt"
    state = torch.load(path, weights_only=True)
    images = images_for(PROMPTS)
    scores = load(published, "imagereward").score(images, PROMPTS)
    unused = [key for key in state if key.endswith("position_ids") or "_proj." in key]
    assert len(unused) == 5
    fewer = {key: tensor for key, tensor in state.items() if key not in unused}
    more = {**state, "blip.text_encoder.pooler.dense.weight": torch.ones(3, 3), "epoch": 3}
    for changed in (fewer, more):
        torch.save(changed, path)
        assert torch.equal(load_scorer("imagereward", where=copied).score(images, PROMPTS), scores)
    for needed in ("mlp.layers.7.bias", "blip.visual_encoder.cls_token", "blip.text_encoder.embeddings.LayerNorm.bias"):
        torch.save({key: tensor for key, tensor in more.items() if key != needed}, path)
        refused(copied, "imagereward", "1 tensor is missing")


def test_the_revisions_of_a_scorers_files_are_recorded(copied, tmp_path):
    for repository, commit in ((VIT_L, "a" * 40), (VIT_H, "b" * 40), (hpsv2.REPOSITORY, "c" * 40)):
        refs = tmp_path / "hub" / f"models--{repository.replace('/', '--')}" / "refs"
        refs.mkdir(parents=True)
        (refs / "main").write_text(commit)
    found = provenance("hpsv2", cache_dir=str(tmp_path / "hub"), dtype=torch.float16)
    assert found["revisions"] == {hpsv2.REPOSITORY: "c" * 40, VIT_H: "b" * 40} and found["dtype"] == "float16"
    assert provenance("appeal")["revisions"] == {}
    local = provenance("hpsv2", where=copied)["revisions"]
    assert all(re.fullmatch("files [0-9a-f]{16}", of) for of in local.values())
    other = Path(shutil.copytree(copied, tmp_path / "other"))
    (other / VIT_H / "config.json").touch()  # another time, the same content
    assert provenance("hpsv2", where=other)["revisions"] == local
    path = other / hpsv2.REPOSITORY / hpsv2.FILES["hpsv2.1"]
    path.write_bytes(path.read_bytes()[:-1])
    assert provenance("hpsv2", where=other)["revisions"] != local


def test_a_clip_that_is_not_one(copied):
    folder = copied / VIT_L
    weights = folder / "model.safetensors"
    model = CLIPModel.from_pretrained(folder)
    whole = weights.read_bytes()
    save_file(model.vision_model.state_dict(), weights, {"format": "pt"})
    shutil.copy(copied / VIT_H / "config.json", folder)
    refused(copied, "clip", "is not a whole CLIP model, .* is missing")
    weights.write_bytes(whole[:-1000])
    refused(copied, "aesthetic", "cannot be loaded as a CLIP model")
    weights.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")  # a pickle is not even looked for
    refused(copied, "clip", "cannot be loaded as a CLIP model")
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    refused(copied, "clip", "cannot be loaded as a CLIP model")
    (folder / "config.json").unlink()
    refused(copied, "clip", "cannot be loaded as a CLIP model")


@pytest.mark.parametrize(
    ("name", "repository"), [("clip", VIT_L), ("pickscore", VIT_H), ("imagereward", imagereward.TOKENIZER)]
)
def test_a_missing_tokenizer(copied, name, repository):
    for path in (copied / repository).iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    refused(copied, name, "the tokenizer of .* (cannot be loaded|knows .* tokens of)")


def test_a_configuration_of_something_else(copied):
    path = copied / imagereward.REPOSITORY / "med_config.json"
    path.write_text("{}")
    refused(copied, "imagereward", "does not describe ImageReward's BERT")
    path.write_text("{")
    refused(copied, "imagereward", "does not describe ImageReward's BERT")


# open_clip itself, where it is installed


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> CLIPTokenizer:
    """transformers' tokenizer of the published vocabulary, which open_clip ships."""
    open_clip = pytest.importorskip("open_clip")
    lines = gzip.open(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz").read().decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    encoder = open_clip.tokenizer.SimpleTokenizer().encoder
    encoder = {re.sub("<(start|end)_of_text>", r"<|\1oftext|>", word): k for word, k in encoder.items()}
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "vocab.json").write_text(json.dumps(encoder))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="<|endoftext|>")


def test_prompts_are_read_as_open_clip_reads_them(vocabulary):
    open_clip = pytest.importorskip("open_clip")
    prompts = [*PROMPTS, "It\u2019s \u201cquoted\u201d; 1234 don't we're  \n\t spaced"]
    prompts.append("&lt;b&gt; na\u00efve \u732b \U0001f600 e\u0301" * 9)
    expected = open_clip.tokenizer.SimpleTokenizer()(prompts)
    ours = vocabulary([cleaning.cleaned(prompt) for prompt in prompts], truncation=True, max_length=77).input_ids
    for ids, row in zip(ours, expected, strict=True):
        assert ids == row[: len(ids)].tolist() and not row[len(ids) :].any()


def test_an_open_clip_model_gives_the_same_scores(copied, vocabulary):
    """Saved by open_clip, loaded by us: the same images, prompts and, to rounding, scores."""
    open_clip = pytest.importorskip("open_clip")
    tokens = len(vocabulary)
    width, layers, heads = scorer_files.VISION
    _, text_width, text_layers, text_heads = scorer_files.TEXT
    model = open_clip.model.CLIP(
        scorer_files.EMBED,
        {
            "width": width,
            "layers": layers,
            "head_width": width // heads,
            "image_size": scorer_files.SIZE,
            "patch_size": scorer_files.PATCH,
        },
        {"width": text_width, "layers": text_layers, "heads": text_heads, "vocab_size": tokens},
    ).eval()
    randomise(model, 7)
    torch.save({"state_dict": model.state_dict()}, copied / hpsv2.REPOSITORY / hpsv2.FILES["hpsv2.1"])
    config = json.loads((copied / VIT_H / "config.json").read_text())
    config["text_config"]["vocab_size"] = tokens
    (copied / VIT_H / "config.json").write_text(json.dumps(config))
    vocabulary.save_pretrained(copied / VIT_H)
    # the plain model that stands for open_clip's elsewhere
    plain = OpenClip(
        scorer_files.EMBED, scorer_files.SIZE, scorer_files.PATCH, scorer_files.VISION, (tokens, *scorer_files.TEXT[1:])
    ).eval()
    plain.load_state_dict(model.state_dict())

    images = images_for(PROMPTS)
    scores = load_scorer("hpsv2.1", where=copied).score(images, PROMPTS)
    words = open_clip.tokenizer.SimpleTokenizer()(PROMPTS)
    with torch.no_grad():
        of_images, of_texts = model(padded(images).float(), words)[:2]
        for ours, theirs in zip(plain(padded(images).float(), words), (of_images, of_texts), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, 100 * (of_images * of_texts).sum(1).double(), rtol=0, atol=1e-3)
