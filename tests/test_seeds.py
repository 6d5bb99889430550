"""The run's seed: given again it gives the same draws, to one test as to all of them; and no test draws otherwise."""

import ast
import re
from pathlib import Path

import pytest

from tests.helpers import seeds

pytest_plugins = ["pytester"]  # runs pytest on files of its own, in this process

TESTS = Path(__file__).parent
DRAWING = """
import random, secrets
from pathlib import Path
import numpy as np, pytest, torch
from tests.helpers import seeds

@pytest.fixture(scope="module")
def shared():
    return torch.rand(()).item()

def note(request, *drawn):
    with Path(__file__).with_name("drawn.txt").open("a") as file:
        print(request.node.name, *drawn, file=file)

@pytest.mark.parametrize("case", ["a b", "c"])
def test_of_all_kinds(request, seed, case):
    own = np.random.default_rng(seed).random()
    note(request, own, torch.rand(()).item(), np.random.rand(), random.random(), secrets.randbits(31))

def test_of_the_module(request, shared):
    note(request, shared, torch.rand(()).item())

def test_of_the_module_too(request, shared):
    note(request, shared, torch.rand(()).item())

def test_of_a_helper(request):
    first, again, other = (torch.rand((), generator=seeds.generator(number)).item() for number in (0, 0, 1))
    assert first == again
    note(request, first, other)

def test_of_nothing():
    pass
"""


@pytest.fixture
def drawn(pytester):
    """Runs DRAWING with some arguments; the result of pytest, and the numbers of each test."""
    pytester.makeconftest(
        "from tests.helpers import seeds\npytest_addoption, pytest_configure = seeds.addoption, seeds.configure"
    )
    pytester.makepyfile(test_drawing=DRAWING)

    def run(*arguments: str) -> tuple[pytest.RunResult, dict[str, list[str]]]:
        file = pytester.path / "drawn.txt"
        file.unlink(missing_ok=True)
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments)
        rows = [re.match(r"(test_\w+(?:\[.*\])?) (.*)", line).groups() for line in file.read_text().splitlines()]
        return result, {name: numbers.split() for name, numbers in rows}

    return run


def test_a_seed_gives_the_same_draws_alone_and_in_any_order(drawn):
    result, all_of_them = drawn("--seed", "5")
    result.assert_outcomes(passed=6)
    assert len(all_of_them) == 5
    numbers = [number for row in all_of_them.values() for number in row]
    assert len(set(numbers)) == len(numbers) - 1  # the fixture of the module is drawn once, for both of its tests
    one = "test_drawing.py::test_of_the_module_too"
    assert drawn("--seed", "5", one)[1] == {"test_of_the_module_too": all_of_them["test_of_the_module_too"]}
    names = ("test_of_a_helper", "test_of_the_module_too", "test_of_the_module", "test_of_all_kinds")
    assert drawn("--seed", "5", *(f"test_drawing.py::{name}" for name in names))[1] == all_of_them
    other = drawn("--seed", "6")[1]
    assert other.keys() == all_of_them.keys() and not {n for row in other.values() for n in row} & set(numbers)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_workers_draw_what_one_process_draws(drawn):
    result, numbers = drawn("-n", "2")
    printed = re.search(r"^seed: (\d+) ", result.stdout.str(), re.M)[1]
    assert drawn("--seed", printed)[1] == numbers == drawn("--seed", printed, "-n", "2")[1]


def test_a_run_without_a_seed_prints_the_new_one_that_it_draws(drawn):
    (first, numbers), (second, others) = drawn(), drawn()
    printed = [re.search(r"^seed: (\d+) ", result.stdout.str(), re.M)[1] for result in (first, second)]
    assert printed[0] != printed[1] and numbers != others
    assert drawn("--seed", printed[0])[1] == numbers


def test_a_failure_comes_with_the_command_that_repeats_it(pytester, drawn):
    pytester.makepyfile(
        test_failing="""
        import pytest
        @pytest.mark.exhaustive
        @pytest.mark.parametrize("case", ["a b"])
        def test_wrong(case):
            assert False
        @pytest.fixture
        def broken():
            raise OSError
        def test_not_set_up(broken):
            pass
        """
    )
    result, _ = drawn("--seed", "7", "-q", "-W", "ignore")
    result.stdout.fnmatch_lines(
        [
            "python -m pytest -n 0 -m exhaustive --seed 7 'test_failing.py::test_wrong[[]a b]'",
            "python -m pytest -n 0 --seed 7 test_failing.py::test_not_set_up",
        ]
    )


def test_tests_that_draw_are_known(pytester, drawn):
    """Only they need other seeds."""
    drawn("--seed", "1", "--junitxml", "report.xml")
    names = re.findall(rf'name="{seeds.DRAWS}" value="([^"]*)"', (pytester.path / "report.xml").read_text())
    assert [name.partition("::")[2] for name in names] == [
        "test_of_all_kinds[a b]", "test_of_all_kinds[c]", "test_of_the_module", "test_of_the_module_too",
        "test_of_a_helper",
    ]  # fmt: skip


# ---- no other source ----------------------------------------------------------------------------------------------


def unseeded(source: str) -> list[int]:
    """The lines on which a generator begins at a state that nobody knows, or a number is drawn while a module loads."""
    tree, lines = ast.parse(source), set()
    seeded = set()  # generators that are seeded where they are made
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        if isinstance(call.func, ast.Attribute) and call.func.attr == "manual_seed":
            seeded.add(call.func.value)
        last = name.rpartition(".")[2]
        makes = last in ("default_rng", "RandomState", "Random") or name == "torch.Generator"
        if makes and not call.args and not call.keywords and call not in seeded:
            lines.add(call.lineno)
        if last in ("SystemRandom", "urandom", "uuid1", "uuid4") or name.startswith("secrets.") or name == "torch.seed":
            lines.add(call.lineno)

    def at_import(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for part in (*getattr(node, "decorator_list", ()), *node.args.defaults, *node.args.kw_defaults):
                if part is not None:
                    at_import(part)
            return
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            generator = any(word.arg == "generator" for word in node.keywords)
            draws = re.fullmatch(r"torch\.(rand|randn|randint|randperm|normal|bernoulli)(_like)?", name)
            if (draws and not generator) or re.fullmatch(r"(np|numpy)\.random\.(?!default_rng|Generator).*", name):
                lines.add(node.lineno)
            if re.fullmatch(r"random\.(?!Random)\w+", name):
                lines.add(node.lineno)
        for child in ast.iter_child_nodes(node):
            at_import(child)

    at_import(tree)
    return sorted(lines)


def test_nothing_is_drawn_from_an_unseeded_generator():
    paths = [
        path for path in sorted(TESTS.rglob("*.py")) if path.name not in ("seeds.py", "long.py", Path(__file__).name)
    ]
    lines = [f"{path.relative_to(TESTS)}:{line}" for path in paths for line in unseeded(path.read_text("utf-8"))]
    assert lines == [], "give the fixture `seed` to the generator, and draw within a test or fixture"


def test_unseeded_generators_are_seen():
    source = """
a = np.random.default_rng()
b = torch.Generator()
X = torch.rand(3)
def test(seed, y=random.random()):
    random.Random()
    np.random.default_rng(seed), torch.Generator().manual_seed(seed), random.Random(seed), torch.rand(3)
    os.urandom(3)
@pytest.mark.parametrize("x", [np.random.rand()])
def other(x):
    np.random.rand()
Y = torch.rand(3, generator=torch.Generator().manual_seed(0))
"""
    assert unseeded(source) == [2, 3, 4, 5, 6, 8, 9]


def test_of_a_test_with_many_cases_a_run_draws_some(pytester):
    """The same ones with one seed, other ones with another; a single case can be asked for, and all."""
    pytester.makeconftest(
        "from tests.helpers import seeds\npytest_addoption, pytest_configure = seeds.addoption, seeds.configure"
    )
    pytester.makeini("[pytest]\nmarkers =\n    drawn(n): some")
    pytester.makepyfile(
        test_many="""
        import pytest

        @pytest.mark.drawn(3)
        @pytest.mark.parametrize("case", range(20))
        def test_many(case):
            print("case", case)

        def test_one():
            pass
        """
    )

    def cases(*arguments: str) -> set[str]:
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-v", *arguments)
        return {line.split()[0].partition("::")[2] for line in result.outlines if " PASSED" in line}

    first = cases("--seed", "1")
    assert len(first) == 4 and "test_one" in first and cases("--seed", "1") == first
    assert len(first | cases("--seed", "2") | cases("--seed", "3")) > 5
    assert len(cases("--seed", "1", "--every")) == 21
    assert cases("--seed", "1", "test_many.py::test_many[7]") == {"test_many[7]"}
