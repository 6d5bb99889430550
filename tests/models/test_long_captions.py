"""Captions of up to 225 tokens: tokens, embeddings and samples against sd-scripts' rule, computed here by hand.

In these tokenizers a word of n letters has n tokens. The independent computation goes from a caption's tokens through
plain lists, one call of the text encoder a chunk, to the embeddings.
"""

import shutil
from pathlib import Path

import pytest
import torch

from dpo_fast.errors import BadInput
from dpo_fast.models import Family, text_recipe_facts
from dpo_fast.models.opened import settled
from dpo_fast.models.sampling import sample
from dpo_fast.models.source import ModelSource
from dpo_fast.models.text_chunks import chunk_ids, joined
from dpo_fast.presets import PRESETS
from tests.helpers.pipelines import load_model, make_sdxl, tokenizer

FP32 = dict(dtype=torch.float32, device="cpu")
CLOSE = dict(rtol=1e-4, atol=1e-5)
SHAPES = PRESETS["shapes"]["pretrained_model_name_or_path"]


@pytest.fixture(scope="session")
def sd2_path(sd15_path, tmp_path_factory) -> Path:
    """A tiny pipeline whose tokenizer pads with "!", as that of Stable Diffusion 2.x; do not write in the folder."""
    folder = Path(shutil.copytree(sd15_path, tmp_path_factory.mktemp("pipelines") / "sd2"))
    shutil.rmtree(folder / "tokenizer")
    tokenizer(pad_token="!").save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def sdxl_encoding_path(tmp_path_factory) -> Path:
    """A tiny SDXL pipeline that encodes an empty prompt like any other; do not write in the folder."""
    return make_sdxl(tmp_path_factory.mktemp("pipelines") / "sdxl-encoding", force_zeros=False)


def letters(seed: int, *lengths: int) -> str:
    """Words of these lengths, of random letters."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(26, (sum(lengths),), generator=generator).tolist()
    text = iter(chr(ord("a") + number) for number in drawn)
    return " ".join("".join(next(text) for _ in range(n)) for n in lengths)


def captions(seed: int) -> list[str]:
    """Captions that end around the borders of the chunks, and some with "!" there, which may be the token that pads."""
    around = [letters(seed + n, n // 3, n - n // 3) for n in (3, 74, 75, 76, 149, 150, 151, 224, 225, 226, 300)]
    padding = [letters(seed + n, n) + "!!" + letters(seed, 40) for n in (73, 74, 75)]
    return ["", "a", *around, *padding]


# ---- the rule, by hand -----------------------------------------------------------------------------------------------


def expected_ids(words, caption: str, length: int) -> list[list[int]]:
    """The tokens of each chunk."""
    start, end, padding = words.bos_token_id, words.eos_token_id, words.pad_token_id
    kept = words(caption, add_special_tokens=False, verbose=False).input_ids[:length]
    whole = [start, *kept, end] + [padding] * (length - len(kept))
    chunks = []
    for first in range(1, length + 1, 75):
        chunk = [whole[0], *whole[first : first + 75], whole[-1]]
        if padding != end:
            if chunk[75] not in (end, padding):
                chunk[76] = end
            if chunk[1] == padding:
                chunk[1] = end
        chunks.append(chunk)
    return chunks


@torch.no_grad()
def expected_embeddings(family: Family, caption: str, length: int) -> dict[str, torch.Tensor]:
    """prompt_embeds [75n+2,D] and for SDXL pooled_prompt_embeds [D], in fp32."""
    pipeline, parts, pooled = family.pipeline, [], None
    for suffix in family.text_encoders:
        words = getattr(pipeline, suffix.replace("text_encoder", "tokenizer"))
        encoder, rows = getattr(pipeline, suffix), []
        chunks = expected_ids(words, caption, length)
        for number, chunk in enumerate(chunks):
            out = encoder(torch.tensor([chunk]), output_hidden_states=True)
            states = out.hidden_states[-2][0] if family.needs_time_ids else out.last_hidden_state[0]
            rows += [states[0]] if number == 0 else []
            rows += [states[place] for place in range(1, 76)]
            rows += [states[76]] if number == len(chunks) - 1 else []
            if suffix == "text_encoder_2" and number == 0:
                end = (
                    chunk.index(words.eos_token_id) if words.eos_token_id in chunk else 0
                )  # before a "!" at the border
                pooled = encoder.text_projection(out.last_hidden_state[0, end])
        parts.append(torch.stack(rows))
    found = {"prompt_embeds": torch.cat(parts, 1)}
    return found if pooled is None else {**found, "pooled_prompt_embeds": pooled}


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_the_tokens_of_chunks(pad_token, seed):
    words = tokenizer(pad_token=pad_token)
    for length in (150, 225):
        found = chunk_ids(words, captions(seed), length).tolist()
        assert found == [expected_ids(words, caption, length) for caption in captions(seed)]


def test_an_example_of_each_case_where_padding_is_a_token_of_its_own():
    words = tokenizer(pad_token="!")
    start, end, letter, last = 512, 513, words("aa").input_ids[1], words("aa").input_ids[2]
    texts = ["a" * 75, "", "a" * 80, "a" * 150, "a" * 74 + "!!"]
    full, empty, part, filled, border = chunk_ids(words, texts, 150).tolist()
    word = [letter] * 74 + [last]
    assert full == [[start, *word, end], [start, end, *[0] * 75]]
    assert empty == [[start, end, *[0] * 75]] * 2
    assert part == [[start, *[letter] * 75, end], [start, *[letter] * 4, last, end, *[0] * 70]]
    assert filled == [[start, *[letter] * 75, end], [start, *word, end]]
    # "!" looks like padding: after the first the chunk has no end, and in the place of the second there is one
    assert border == [[start, *word[1:], 0, 0], [start, end, end, *[0] * 74]]


def test_states_are_joined_without_the_inner_ends():
    states = torch.arange(3 * 77.0).view(1, 3, 77, 1)
    places = [0, *range(1, 76), *range(78, 153), *range(155, 231)]
    assert joined(states).flatten().tolist() == places and len(places) == 227


# ---- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [150, 225])
@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_embeddings_are_those_of_the_rule(request, name, length, seed):
    family = load_model(request.getfixturevalue(f"{name}_path"), max_token_length=length, **FP32)
    texts = captions(seed)
    ours, kept = family.sampling_inputs(texts), family.encode_prompts(texts)
    assert ours["prompt_embeds"].shape[1] == length + 2
    for row, text in enumerate(texts):
        for part, expected in expected_embeddings(family, text, length).items():
            torch.testing.assert_close(ours[part][row], expected, **CLOSE)
            torch.testing.assert_close(kept[part][row].float(), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_a_short_caption_has_what_it_has_at_75_tokens_in_its_first_chunk(request, name, seed):
    path = request.getfixturevalue(f"{name}_path")
    usual, long = load_model(path, **FP32), load_model(path, max_token_length=225, **FP32)
    texts = ["", letters(seed, 5, 3), letters(seed, 74)]
    one, other = usual.encode_prompts(texts), long.encode_prompts(texts)
    close = dict(rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(other["prompt_embeds"][:, :76], one["prompt_embeds"][:, :76], **close)
    if name == "sdxl":
        torch.testing.assert_close(other["pooled_prompt_embeds"], one["pooled_prompt_embeds"], **close)


def test_what_is_cut_off_says_nothing_and_is_told(request, seed):
    for name, path in [(name, request.getfixturevalue(f"{name}_path")) for name in ("sd15", "sdxl")]:
        for length in (75, 150, 225):
            family = load_model(path, max_token_length=length, **FP32)
            texts = [letters(seed, n) for n in (length - 1, length, length + 1)]
            assert family.cut_off(texts) == ([False, False, True], length), name
            swapped = [text[:-1] + ("q" if text[-1] != "q" else "r") for text in texts]
            ours, theirs = (family.encode_prompts(some)["prompt_embeds"] for some in (texts, swapped))
            assert [torch.equal(*both) for both in zip(ours, theirs, strict=True)] == [False, False, True]


def test_the_cache_key_of_75_tokens_is_as_it_was(sdxl_path):
    usual, long = load_model(sdxl_path, **FP32), load_model(sdxl_path, max_token_length=150, **FP32)
    before, now = text_recipe_facts(usual), text_recipe_facts(long)
    assert "max_token_length" not in before and now == {**before, "max_token_length": 150}


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """What the UNet of a family is given in its first step of sampling."""

    def record(family: Family, *arguments: object, **options: object) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        calls, forward = [], family.unet.forward

        def spy(noisy, timestep, *, encoder_hidden_states, added_cond_kwargs=None, **more):
            pooled = (added_cond_kwargs or {}).get("text_embeds")
            calls.append({"prompt_embeds": encoder_hidden_states, "pooled_prompt_embeds": pooled})
            added = {"added_cond_kwargs": added_cond_kwargs, "encoder_hidden_states": encoder_hidden_states}
            return forward(noisy, timestep, **added, **more)

        with monkeypatch.context() as patch:
            patch.setattr(family.unet, "forward", spy)
            images = sample(family, *arguments, resolution=64, steps=2, **options)
        return calls[0], images

    return record


@pytest.mark.parametrize("layouts", [False, True], ids=["noise", "layouts"])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sdxl_encoding"])
def test_samples_are_guided_by_whole_captions_against_as_long_an_empty_one(request, seen, name, layouts, seed):
    family = load_model(request.getfixturevalue(f"{name}_path"), max_token_length=150, **FP32)
    text = letters(seed, 60, 60)
    options: dict = {"guidance": 5.0, "batch_size": 2}
    if layouts:
        drawn = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        options |= {"layouts": drawn, "strength": 1.0}
    given, images = seen(family, [text, "a cat"], [1, 2], **options)
    expected = [expected_embeddings(family, one, 150) for one in ("", "", text, "a cat")]
    for part in expected[0]:
        wanted = torch.stack([one[part] for one in expected])
        if name == "sdxl":  # its unconditional input is zero
            wanted[:2] = 0
        torch.testing.assert_close(given[part], wanted, **CLOSE)
    other, changed = seen(family, [text[:-1] + "?", "a cat"], [1, 2], **options)
    assert not torch.equal(images[0], changed[0])  # the 121st token counts
    assert torch.equal(given["prompt_embeds"][:2], other["prompt_embeds"][:2])


def test_samples_without_guidance_see_the_caption_alone(turbo_path, seen, seed):
    family = load_model(turbo_path, turbo=True, max_token_length=225, **FP32)
    given, _ = seen(family, [letters(seed, 200)], [1])
    assert given["prompt_embeds"].shape == (1, 227, 80)


def test_dropped_captions_are_as_long(sd15_path, sdxl_path):
    for path in (sd15_path, sdxl_path):
        family = load_model(path, max_token_length=150, **FP32)
        assert family.empty_prompt()["prompt_embeds"].shape[1] == 152
        expected = family._unconditional(expected_embeddings(family, "", 150))["prompt_embeds"]
        torch.testing.assert_close(family.empty_prompt()["prompt_embeds"][0].float(), expected, rtol=2e-3, atol=1e-4)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("open_it", [settled, lambda source: load_model(SHAPES, max_token_length=150, **FP32)])
def test_text_encoders_of_other_lengths_are_refused(open_it):
    with pytest.raises(
        BadInput, match=r"--max_token_length \(150\) needs text encoders of 77 positions.*has 16: leave"
    ):
        open_it(ModelSource(SHAPES, max_token_length=150))
    assert settled(ModelSource(SHAPES)).max_token_length == 75
