"""The prompt and the seed of an image, as tools write them into PNG files: diffusers and dpo_fast, A1111 and Forge,
ComfyUI.

Files are strangers': whatever cannot be read is no prompt.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_fast.data.images import texts_of
from dpo_fast.files import parse_json

LONGEST = 4000  # characters of a prompt
DEEPEST = 20  # nodes from a sampler to its text
SAMPLERS = ("positive", "conditioning", "guider", "basic_pipe", "cond")  # inputs that lead to the positive text


def prompt_image(file: Path) -> tuple[str, int | None] | None:
    """Return the prompt and the seed (None: unknown) written in a PNG, or None."""
    if file.suffix.lower() != ".png":
        return None
    try:
        with open(file, "rb") as opened:
            texts = texts_of(opened)
    except Exception:  # a broken file raises nearly anything; preparing it says what is wrong
        return None
    for read in (_of_comfy, _of_a1111, _of_diffusers):
        found = read(texts)
        if found is not None and found[0].strip():
            text = " ".join(found[0].split())[:LONGEST]
            return text, found[1]
    return None


def _of_diffusers(texts: Mapping[str, str]) -> tuple[str, int | None] | None:
    """The text `prompt`; the seed is trusted where dpo_fast noted that of the noise."""
    prompt = texts.get("prompt")
    if prompt is None or prompt.lstrip().startswith("{"):
        return None
    return prompt, _number(texts.get("seed")) if "noise_seed" in texts else None


def _of_a1111(texts: Mapping[str, str]) -> tuple[str, int | None] | None:
    """The text `parameters`: the prompt, then `Negative prompt: ...`, then `Steps: 20, Sampler: ..., Seed: 1, ...`."""
    parameters = texts.get("parameters")
    if parameters is None or parameters.lstrip().startswith("{"):
        return None
    lines = parameters.splitlines()
    end = next((k for k, line in enumerate(lines) if re.match(r"(Negative prompt:|Steps: \d+,)", line)), len(lines))
    seed = re.search(r"(?:^|, )Seed: (\d+)", lines[-1]) if lines else None
    return "\n".join(lines[:end]), _number(seed[1]) if seed else None


def _of_comfy(texts: Mapping[str, str]) -> tuple[str, int | None] | None:
    """The text `prompt`, a graph of nodes {id: {class_type, inputs}}: follow a sampler's positive input to its text."""
    try:
        graph = parse_json(texts["prompt"])
    except (KeyError, ValueError):
        return _of_workflow(texts)
    if not isinstance(graph, dict):
        return None
    nodes = {
        key: node for key, node in graph.items() if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }
    for node in nodes.values():
        inputs = node["inputs"]
        if "positive" not in inputs and "guider" not in inputs:
            continue
        text = _text_at(nodes, next(inputs[name] for name in SAMPLERS if name in inputs), DEEPEST, set())
        if text:
            return text, _seed_of(nodes, inputs)
    return None


def _text_at(nodes: Mapping[str, Any], link: Any, deep: int, seen: set[str]) -> str | None:
    """The text that a link [node, output] leads to, by nodes that are not in `seen`; or the text itself."""
    if isinstance(link, str):
        return link
    key = str(link[0]) if isinstance(link, list) and link else ""
    node = nodes.get(key)
    if node is None or not deep or key in seen:  # each node once: links of a stranger's file may form a cycle
        return None
    seen.add(key)
    inputs = node["inputs"]
    for name in ("text", "text_g", "prompt", "string", "value", "t5xxl", "clip_l", *SAMPLERS):
        found = _text_at(nodes, inputs[name], deep - 1, seen) if name in inputs else None
        if found:
            return found
    return None


def _seed_of(nodes: Mapping[str, Any], inputs: Mapping[str, Any]) -> int | None:
    for name in ("seed", "noise_seed"):
        value = inputs.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    noise = inputs.get("noise")
    node = nodes.get(str(noise[0])) if isinstance(noise, list) and noise else None
    return _seed_of(nodes, {**node["inputs"], "noise": None}) if node is not None else None


def _of_workflow(texts: Mapping[str, str]) -> tuple[str, int | None] | None:
    """The text `workflow`, ComfyUI's editor's form: the first text node that feeds a `positive` input."""
    try:
        workflow = parse_json(texts["workflow"])
        nodes = {node["id"]: node for node in workflow["nodes"]}
        links = {link[0]: link for link in workflow["links"]}  # number, from node, its output, to node, its input, kind
        for node in nodes.values():
            for entry in node.get("inputs") or ():
                if entry.get("name") != "positive" or entry.get("link") is None:
                    continue
                source = nodes[links[entry["link"]][1]]
                text = next((one for one in source.get("widgets_values") or () if isinstance(one, str)), None)
                if text:
                    return text, None
    except (LookupError, TypeError, AttributeError, ValueError):
        return None
    return None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) <= 20 else None
