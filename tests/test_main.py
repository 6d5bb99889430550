"""`python -m dpo_fast` and `dpo-fast`: the list, the commands, and the version of each."""

import platform
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

import dpo_fast
from dpo_fast import __main__ as commands
from dpo_fast import version
from dpo_fast.kernels.dispatch import usable_backends
from tests.helpers.runs import environment

PACKAGE = Path(dpo_fast.__file__).parent


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_the_commands_are_listed(capfd, argv):
    assert commands.main(argv) == 0
    out, err = capfd.readouterr()
    assert err == "" and all(len(line) <= 110 for line in out.splitlines())
    for name, what in commands.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(what)}$", out, re.MULTILINE)


def test_every_command_has_a_row_and_every_row_a_command():
    modules = {path.stem for path in PACKAGE.glob("*.py") if 'if __name__ == "__main__":' in path.read_text()}
    assert modules - {"__main__"} == set(commands.COMMANDS)
    for name in commands.COMMANDS:
        module = import_module(f"dpo_fast.{name}")
        assert callable(module.main) and f"`python -m dpo_fast.{name}" in module.__doc__


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_command_gets_its_words_and_gives_its_status(monkeypatch, name):
    given = []
    monkeypatch.setattr(import_module(f"dpo_fast.{name}"), "main", lambda argv: given.append(argv) or 7)
    assert commands.main([name, "--preset", "shapes", "help"]) == 7
    assert given == [["--preset", "shapes", "help"]]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "there is no command 'trian': did you mean train?"),
        (["--preset", "shapes"], "there is no command '--preset': the commands are train, cache, "),
        (["help", "evalute"], "there is no command 'evalute': did you mean evaluate?"),
    ],
)
def test_an_unknown_command_is_one_line(capfd, argv, said):
    assert commands.main(argv) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"dpo_fast: error: {said}") and err.count("\n") == 1


@pytest.mark.parametrize("name", [None, *commands.COMMANDS])
def test_every_command_has_a_version(capfd, name):
    for more in ([], ["--preset", "shapes"]):
        words = ["--version", *more]
        assert (commands.main(words) if name is None else import_module(f"dpo_fast.{name}").main(words)) == 0
        out, err = capfd.readouterr()
        assert err == "" and out.count("\n") == 1
        assert out.startswith(f"dpo_fast {dpo_fast.__version__} (Python {platform.python_version()}, torch ")


def test_the_version_says_what_the_kernels_were_compiled_for(monkeypatch):
    assert ("native kernels: none" in version.version_line()) == bool(usable_backends("cpu")["native"])
    for built, said in (
        (SimpleNamespace(cuda_cubins="", cuda_ptx=""), "C++"),
        (SimpleNamespace(cuda_cubins="80,90", cuda_ptx="90"), "C++ and CUDA for sm_80, sm_90, and PTX of compute_90"),
    ):
        monkeypatch.setitem(sys.modules, "dpo_fast._native", built)
        assert version.version_line().endswith(f", native kernels: {said})")
    monkeypatch.setitem(sys.modules, "dpo_fast._native", None)
    assert version.version_line().endswith(", native kernels: none)")
    assert version.version_of("nobody-s-package") == "not installed"


def test_the_module_and_the_script_start_without_the_heavy_libraries():
    script = """
import sys
from dpo_fast.__main__ import script
try:
    script()
except SystemExit as end:
    print(end.code, sorted({"torch", "tyro", "numpy"} & sys.modules.keys()))
"""
    assert '\ndpo-fast = "dpo_fast.__main__:script"\n' in (PACKAGE.parent / "pyproject.toml").read_text()
    for command in (["-c", script, "--version"], ["-m", "dpo_fast", "nothing-like-it"]):
        done = subprocess.run([sys.executable, *command], env=environment(), capture_output=True, text=True, timeout=60)
        if command[0] == "-c":
            assert done.stdout.splitlines()[1] == "0 []"
        else:
            assert done.returncode == 2 and done.stderr.startswith("dpo_fast: error: there is no command")


def test_a_command_s_flags_are_refused_as_by_the_command(capfd):
    assert commands.main(["train", "--beta_dopo", "3"]) == 2
    first = capfd.readouterr().err
    assert import_module("dpo_fast.train").main(["--beta_dopo", "3"]) == 2
    assert capfd.readouterr().err == first and "did you mean --beta_dpo?" in first
