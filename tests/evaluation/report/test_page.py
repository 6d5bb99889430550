"""The page: well-formed, complete in itself, within its size, safe from what prompts hold; which pairs it shows."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from dpo_fast.evaluation.findings import About, judge
from dpo_fast.evaluation.report.gallery import DEEP, Role, choose
from dpo_fast.evaluation.report.page import AT_THE_TOP, page
from dpo_fast.evaluation.scored import Scored
from dpo_fast.evaluation.signals import measure

VOID = {"meta", "img", "input", "br", "rect", "line", "circle"}
ODD = [
    "<script>alert('x')</script>",
    "\"><img src=x onerror=alert(1)> & 'quotes'",
    "a fox 🦊, très \u200fقطة صغيرة",
    "a bell \x07 and half a pair \ud83e",
    "</style></script><!-- ",
]


class Tree(HTMLParser):
    """Elements with their attributes and text; fails where an end tag does not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} names an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def scored(rows: int = 24, categories: bool = True) -> Scored:
    prompts = [ODD[row] if row < len(ODD) else f"prompt {row // 2}" for row in range(rows)]
    base = {name: torch.randn(rows).double() for name in ("beauty", "<b>truth</b>")}
    policy = {name: torch.randn(rows).double() for name in base}
    names = [("<i>people</i>", 'the "rest"')[row % 2] for row in range(rows)] if categories else None
    return Scored(prompts, [*range(rows)], base, policy, names)


def made(of: Scored, side: int = 32, **options: int) -> str:
    base, policy = (torch.randint(0, 256, (len(of.prompts), 3, side, side), dtype=torch.uint8) for _ in range(2))
    about = About("<base>", "policy & more", "set", "today", {"Sampler": "<DDIM>"})
    return page(judge(of, measure(base, policy, of.prompts), about, resamples=99), of, base, policy, **options)


def test_the_page_says_which_models_and_scorers_were_used():
    of = scored()
    images = torch.zeros(len(of.prompts), 3, 32, 32, dtype=torch.uint8)
    files = {"owner/model": "a" * 40, "runs/<x>": "files 0123456789abcdef"}
    about = About(
        *("base", "policy", "set", "today", {}),
        models={"policy": files},
        scorers={"beauty": {"dtype": "float16", "text": "without ftfy", "revisions": {"owner/scorer": "b" * 40}}},
    )
    text = page(judge(of, [], about, resamples=99), of, images, images)
    assert f"<dt>Files, policy</dt><dd>owner/model @ {'a' * 40}, runs/&lt;x&gt; @ files 0123456789abcdef</dd>" in text
    row = f"owner/scorer @ {'b' * 40}, dtype float16, text without ftfy"
    assert f"<dt>Scorer beauty</dt><dd>{row}</dd>" in text


@pytest.mark.parametrize("categories", [True, False])
def test_the_page_is_whole_and_loads_nothing(categories):
    of = scored(categories=categories)
    text = made(of)
    text.encode()  # no half of a surrogate pair
    tree = Tree(text)
    without_data = re.sub(r"base64,[\w+/=]*|^// .*$", "", text, flags=re.M)  # and comments of the script
    assert not re.search(r"https?:|//|@import|url\(", without_data)
    assert all(set(a) & {"href", "srcset", "action", "onclick", "onerror"} == set() for _, a in tree.elements)
    sources = [attributes["src"] for _, attributes in tree.elements if "src" in attributes]
    pairs, gain = len(tree.of("article")), of.gain("beauty")
    moved = [{prompt for prompt, by in zip(of.prompts, gain * sign, strict=True) if by > 0} for sign in (1, -1)]
    assert len(sources) == 2 * pairs + 3 * sum(min(AT_THE_TOP, len(prompts)) for prompts in moved)
    assert pairs > 8 and f"{pairs} of 24 pairs" in text
    for attributes in tree.of("img"):
        kind, data = attributes["src"].split(",")
        assert kind == "data:image/webp;base64" and attributes["alt"]
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.size == (int(attributes["width"]), int(attributes["height"])) == (32, 32)
    assert len(tree.of("script")) == len(tree.of("style")) == 1
    assert ("Category" in tree.texts["label"]) == categories
    (policy,) = (a["content"] for a in tree.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_what_prompts_hold_is_text():
    of = scored(len(ODD))  # so few that all are shown
    tree = Tree(made(of))
    shown = tree.texts["p"]
    for prompt in ODD[:3] + ODD[4:]:
        assert prompt in shown
    assert "a bell \ufffd and half a pair \ufffd" in shown
    assert "<base>" in tree.texts["span"] and "<DDIM>" in tree.texts["dd"]
    assert {"<b>truth</b>", "beauty"} <= set(tree.texts["option"]) and "<i>people</i>" in tree.texts["bdi"]
    assert not tree.of("i") or all(set(attributes) == {"class"} for attributes in tree.of("i"))
    assert all(attributes["dir"] == "auto" for attributes in tree.of("p") if attributes.get("class") == "prompt")


def test_charts_say_in_words_what_they_draw():
    of = scored()
    tree = Tree(made(of))
    bars = [attributes for attributes in tree.of("svg") if attributes.get("class") == "bar"]
    assert len(bars) == 2 + 2 * 2 and all(attributes["role"] == "img" for attributes in bars)
    rate = ((of.policy["beauty"] > of.base["beauty"]).double()).mean().item()
    assert bars[0]["aria-label"].startswith(f"beauty: win rate {rate:.3f}, 95% interval ")
    assert any(attributes.get("cx") == f"{rate:.2%}" for attributes in tree.of("circle"))


def test_the_largest_gains_stand_at_the_top_and_the_largest_losses_behind_a_click():
    gain = torch.tensor([0.0, 3, -1, 5, -4, 1, 2, 4, -2, 0]).double()
    base = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    policy = base.clone()
    policy[:, 0, 4, 8] ^= 0b110  # at most 6 levels
    of = Scored([f"prompt {k}" for k in range(10)], [0] * 10, {"s": torch.zeros(10).double()}, {"s": gain})
    text = page(judge(of, [], About("base", "policy", "set", "today", {}), resamples=99), of, base, policy)
    section = text[text.index("<section id=changes>") : text.index("</section>")]
    said = "The 4 largest gains by s, a prompt at most once, of 10 pairs of 10 prompts: 5 gained, 3 lost, 2 tied."
    assert said in section and "times 32; black did not move" in section
    top, losses = section.split("<details")
    prompts = [re.findall(r'dir="auto">(prompt \d)', part) for part in (top, losses)]
    assert prompts == [["prompt 3", "prompt 7", "prompt 1", "prompt 6"], ["prompt 4", "prompt 8", "prompt 2"]]
    assert "The 3 largest losses by s" in losses
    tree = Tree(top + "</section>")
    for (row, side), attributes in zip([(r, s) for r in (3, 7, 1, 6) for s in range(3)], tree.of("img"), strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",")[1])))
        shown = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).int()
        moved = (policy[row].int() - base[row].int()).abs().amax(0, keepdim=True).expand(3, -1, -1) * 32
        assert torch.equal(
            shown, (base[row].int(), policy[row].int(), moved)[side]
        )  # lossless: no larger than LOSSLESS


def test_where_nothing_moved_nothing_is_shown_as_a_gain():
    zeros, images = {"s": torch.zeros(6).double()}, torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    of = Scored([str(k) for k in range(6)], [0] * 6, zeros, zeros)
    text = page(judge(of, [], About("base", "policy", "set", "today", {}), resamples=99), of, images, images)
    assert "Of 6 pairs of 6 prompts: 0 gained, 0 lost, 6 tied." in text and "<details" not in text
    assert "<b>No difference shown</b>, as s decides: win rate 0.500 [0.500, 0.500] holds 0.5." in text


def test_images_of_different_sizes_have_no_difference():
    of = scored(8, categories=False)
    base, policy = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8, 3, 48, 32, dtype=torch.uint8)
    found = judge(of, measure(base, policy, of.prompts), About("base", "policy", "set", "today", {}), resamples=99)
    tree = Tree(page(found, of, base, policy))
    assert not any("difference" in text for text in tree.texts["figcaption"])
    assert {(a["height"], a["width"]) for a in tree.of("img")} == {("32", "32"), ("48", "32")}


def test_the_verdict_and_its_price_stand_in_the_headline():
    rows = 60
    base = {"beauty": torch.zeros(rows).double(), "<b>truth</b>": torch.zeros(rows).double()}
    policy = {"beauty": torch.ones(rows).double(), "<b>truth</b>": -torch.ones(rows).double()}
    of = Scored([str(k) for k in range(rows)], [0] * rows, base, policy)
    images = torch.zeros(rows, 3, 16, 16, dtype=torch.uint8)
    about = About("base", "policy", "set", "today", {}, trained_towards_the_first=True)
    text = page(judge(of, [], about, resamples=99), of, images, images)
    head = text[text.index("<header>") : text.index("</header>")]
    assert "<strong>100.0%</strong>" in head and "<b>Aligned</b>, as beauty decides (the first of 2 scorers)" in head
    assert "<mark>paid for with &lt;b&gt;truth&lt;/b&gt; (win rate 0.000 [0.000, 0." in head
    assert head.index("</h1>") < head.index("100.0%") and text.index("</header>") < text.index("What changed")


def test_large_images_are_made_small_enough():
    text = made(scored(8), side=300, thumbnail=200, max_bytes=300_000)
    tree = Tree(text)
    widths = {int(attributes["width"]) for attributes in tree.of("img")}
    assert len(widths) == 1 and 96 < min(widths) < 200
    assert sum(len(attributes["src"]) for attributes in tree.of("img")) <= 300_000
    assert f"at most {min(widths)} pixels" in text
    assert {int(a["width"]) for a in Tree(made(scored(8), side=300, thumbnail=200)).of("img")} == {200}


def test_the_script_finds_each_list():
    of = scored()
    found: dict[str, list[tuple[int, str]]] = {}
    tree = Tree(made(of))
    for attributes in tree.of("article"):
        for key, place in json.loads(attributes["data-places"]).items():
            found.setdefault(key, []).append(place)
    assert {"best.0.", "worst.1.", "random..", "best.1.0", "random..1"} <= set(found)
    assert all(sorted(places) == list(range(len(places))) for places in found.values())


def test_the_pairs_shown_are_the_extremes():
    rows = 400
    gain = torch.randn(rows, dtype=torch.float64)  # no two alike, as there would be in fp32
    of = Scored([str(row) for row in range(rows)], [0] * rows, {"s": torch.zeros(rows).double()}, {"s": gain})
    lists: dict[Role, dict[int, int]] = {}
    for one in choose(of, 100, seed=4):
        for role, place in one.roles.items():
            lists.setdefault(role, {})[place] = one.row
    order = gain.argsort(descending=True).tolist()
    assert [lists[Role("best", "s", None)][k] for k in range(DEEP)] == order[:DEEP]
    assert [lists[Role("worst", "s", None)][k] for k in range(DEEP)] == order[::-1][:DEEP]
    drawn = set(lists[Role("random", None, None)].values())
    assert len(drawn) == DEEP
    assert choose(of, 100, seed=4) == choose(of, 100, seed=4) != choose(of, 100, seed=5)


def test_few_pairs_are_shared_out_fairly():
    of = scored(60)
    for most in (0, 1, 9, 30):
        shown = choose(of, most)
        assert len(shown) == min(most, 60) == len({one.row for one in shown})
    kinds = {role.kind for one in choose(of, 9) for role in one.roles}
    assert kinds == {"best", "worst", "random"}
    alike = Scored(["same"] * 6, [*range(6)], {"s": torch.zeros(6)}, {"s": torch.arange(6.0)})
    assert [one.row for one in choose(alike, 9) if Role("best", "s", None) in one.roles] == [5]  # one of a prompt
