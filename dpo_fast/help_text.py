"""What `--help` prints: the flags of a dataclass by section, with their sentences, kinds of values and defaults.

The sections are the lines `# ---- title ----` in the dataclass, the sentences the texts under its fields.
"""

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import tyro

from dpo_fast.errors import printable

HELP = ("-h", "--help")
NARROWEST, WIDEST = 60, 110  # columns of the page
INDENT = " " * 6  # of a flag's sentence
KINDS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
_TITLE = re.compile(r"\s*# ---- (.+?) -+$")


@dataclass(frozen=True)
class Page:
    """What the help of a command says besides its flags' own texts."""

    prog: str  # how the command is called
    flags: type  # the dataclass
    about: str = ""  # further sentences, below those of the dataclass
    what: str | None = None  # what the command does; None: the dataclass says it
    usage: str = "[--FLAG VALUE ...]"
    only: Collection[str] | None = None  # the flags that are shown; None: all
    own: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # further flags: name -> kind of value, sentence
    texts: Mapping[str, str] = field(default_factory=dict)  # name -> a sentence in the place of the dataclass's
    lists: Collection[str] = ()  # flags that take several values with commas


def asks_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return any(word in HELP for word in argv)


def without_help(argv: Sequence[str]) -> list[str]:
    """Return the other words of a command line."""
    return [word for word in argv if word not in HELP]


def show_help(page: Page, defaults: object = None, origins: Mapping[str, str] | None = None) -> NoReturn:
    """Print a page and end with exit status 0. defaults, origins: as for `text_of`."""
    print(text_of(page, defaults, origins))
    raise SystemExit(0)


def text_of(page: Page, defaults: object = None, origins: Mapping[str, str] | None = None) -> str:
    """Return the text of a page.

    defaults: an instance of the dataclass; None: the defaults of its fields. origins: name -> where a default is from,
    if not from the dataclass.
    """
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    hints = typing.get_type_hints(page.flags, include_extras=True)
    described, origins = _described(page.flags), origins or {}

    def paragraphs(text: str) -> list[str]:
        return [textwrap.fill(" ".join(part.split()), width) for part in text.split("\n\n") if part.strip()]

    def entry(head: str, sentence: str) -> list[str]:
        whole = {"break_long_words": False, "break_on_hyphens": False}
        return [
            textwrap.fill(head, width, initial_indent="  ", subsequent_indent=INDENT, **whole),
            textwrap.fill(sentence, width, initial_indent=INDENT, subsequent_indent=INDENT, **whole),
        ]

    lines = [f"usage: {page.prog} {page.usage}"]
    for text in (page.what or inspect.getdoc(page.flags) or "", page.about):
        for part in paragraphs(text):
            lines += ["", part]
    if page.own:
        lines += ["", "flags of this command"]
        for name, (kind, sentence) in page.own.items():
            lines += entry(f"--{name} {kind}", sentence)
    section = None
    for one in dataclasses.fields(page.flags):
        title, sentence = described[one.name]
        if page.only is not None and one.name not in page.only:
            continue
        if title != section:
            lines += ["", title]
            section = title
        default = one.default if defaults is None else getattr(defaults, one.name)
        shown = _shown(default)
        if one.name in origins:
            shown += f", from {origins[one.name]}"
        sentence = page.texts.get(one.name, sentence)
        lines += entry(_head(one.name, hints[one.name], one.name in page.lists), f"{sentence} (default: {shown})")
    return "\n".join([*lines, "", "  -h, --help, --version"])


def titles(flags: type) -> list[str]:
    """Return the sections of a dataclass, in their order."""
    return list(dict.fromkeys(title for title, _ in _described(flags).values()))


def _described(flags: type) -> dict[str, tuple[str, str]]:
    """Return field -> the title of its section and the text under it, from the source of the class and its bases."""
    found: dict[str, tuple[str, str]] = {}
    for of in reversed([one for one in flags.__mro__ if dataclasses.is_dataclass(one)]):
        lines = textwrap.dedent(inspect.getsource(of)).splitlines()
        (tree,) = ast.parse("\n".join(lines)).body
        title, line = None, 0  # None: above the first title; a field of a base stays in its section
        for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
            above = filter(None, map(_TITLE.match, lines[line : node.lineno - 1]))
            title, line = next((match[1] for match in above), title), node.end_lineno
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = following.value.value if isinstance(following, ast.Expr) else ""
                section = title or found.get(node.target.id, ("flags",))[0]
                found[node.target.id] = section, " ".join(text.split())
    return found


def _head(name: str, hint: object, listed: bool) -> str:
    """Return a flag with the kind of its value."""
    if hint is bool:
        return f"--{name}, --no_{name}"
    kind = _kind(hint)
    return f"--{name} {kind}[,...]" if listed else f"--{name} {kind}"


def _kind(hint: object) -> str:
    """Return the kind of a flag's value by its type: INT, {one,another}, TEXT ..."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:  # tyro's mark of a flag that is given once for each of its values
        return _kind(parts[0]).removesuffix(" ...") if tyro.conf.UseAppendAction in parts[1:] else _kind(parts[0])
    if origin is typing.Literal:
        return f"{{{','.join(parts)}}}"
    if origin in (typing.Union, types.UnionType):
        return "|".join(_kind(part) for part in parts if part is not types.NoneType)
    if origin is tuple:
        return f"{_kind(parts[0])} ..." if parts[1:] == (...,) else " ".join(map(_kind, parts))
    return KINDS[hint]


def _shown(value: object) -> str:
    """Return a default as it would be written on a command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return printable(" ".join(map(str, value))) or "none"
    return printable(str(value))
