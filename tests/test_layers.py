"""The rooms of the house and who may call whom: every import goes downwards."""

import ast
from pathlib import Path

import pytest

import dpo_fast

ROOT = Path(dpo_fast.__file__).parent
# From the ground up; modules of one level do not import each other, files of one package may.
LEVELS = [
    ["errors", "quiet", "threads", "statistics", "version", "fonts"],
    ["files", "heartbeat", "help_text", "plain_table"],
    ["cli"],
    ["locks", "checksums", "hub_revisions", "kernels", "presets", "captions"],
    ["output_folder", "draws", "schedule", "objectives", "pictures", "plot", "parallel", "store", "jobs"],
    ["config"],
    ["command_line"],
    ["models", "data"],
    ["shapes", "forward"],
    ["caching", "scorers", "choices", "votes"],
    ["training"],
    ["evaluation"],
    ["relabeling", "comparing", "voting"],
    ["api"],
    ["train", "cache", "env", "evaluate", "generate", "pick", "relabel", "sweep", "compare", "vote"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms of dpo_fast that a file imports, anywhere in it."""
    return rooms_in(ast.parse(path.read_text(encoding="utf-8")))


def rooms_in(tree: ast.AST) -> set[str]:
    rooms = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            rooms |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in rooms if name.startswith("dpo_fast.")} - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    room = room_of(path)
    if room == "__init__":
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
        assert rooms_in(tree) == {"quiet"}  # what it offers is imported when it is used
        return
    for other in imported_rooms(path) - {room}:
        assert LEVEL[other] < LEVEL[room], f"{room} (level {LEVEL[room]}) imports {other} (level {LEVEL[other]})"


def test_every_room_has_a_level():
    assert {room_of(path) for path in FILES} - {"__init__"} == set(LEVEL)
