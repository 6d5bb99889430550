"""One seed for a run of the tests, from which every test draws: a pytest plugin.

The seed is new in each run, printed in the header, and taken from `--seed` where that is given. A test's own seed is
derived from it and from the test's node id, so a test draws the same numbers alone, in any order and on any worker.
The global generators of PyTorch, NumPy and `random` (and `secrets.randbits`, with which a run without --seed chooses
one) start from it before each test; the fixture `seed` is for generators of a test's own, `generator` for those of
helpers. Before a fixture of a broader scope is set up, all are seeded from the fixture's name instead: which test comes
first must not matter.
"""

import hashlib
import random
import secrets
import shlex
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# How many standard errors a simulated statistic may be off: by chance a normal one is further off in 3e-12 of all runs,
# so that all of the suite's hundreds together, skewed ones too, give a false alarm in fewer than 1e-6 of them.
SIGMAS = 7
DRAWS = "draws"  # the property, with the node id as its value, of a test that drew from the run's seed


def derived(seed: int, name: str) -> int:
    """The seed in [0, 2^31) of a test or fixture called `name` in a run with `seed`."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big") >> 1


def set_seed(seed: int) -> None:
    """Seed the global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def get_states() -> tuple:
    """The states of the global generators, to compare and for `set_states`."""
    kind, words, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), (kind, tuple(words.tolist()), *rest), random.getstate()


def set_states(states: tuple) -> None:
    """Set the global generators to states from `get_states`."""
    torch.set_rng_state(torch.frombuffer(bytearray(states[0]), dtype=torch.uint8))
    np.random.set_state(states[1])
    random.setstate(states[2])


STATES = pytest.StashKey[tuple]()
_seed, _drew = 0, False  # of the test or fixture that runs; whether it asked for `generator`


def generator(number: int = 0) -> torch.Generator:
    """A CPU generator for helpers: the same again at each call with the same number within one test."""
    global _drew
    _drew = True
    return torch.Generator().manual_seed(_seed + number)


def _begin(seed: int) -> None:
    global _seed, _drew
    _seed, _drew = seed, False
    set_seed(seed)


class Seeds:
    """Seeds every test and every fixture of a broader scope, and records which of them drew."""

    def __init__(self, run_seed: int) -> None:
        self.run_seed = run_seed
        self.drawing_fixtures: set[str] = set()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Of the cases of a test that is marked `drawn(n)` keep n, in every run other ones, unless --every is given."""
        cases: dict[str, list[pytest.Item]] = {}
        for item in items:
            if item.get_closest_marker("drawn") and not config.getoption("--every"):
                cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
        left_out = set()
        for name, of_test in cases.items():
            most = min(len(of_test), of_test[0].get_closest_marker("drawn").args[0])
            kept = random.Random(derived(self.run_seed, name)).sample(of_test, most)
            left_out |= {item.nodeid for item in of_test} - {item.nodeid for item in kept}
        if left_out:
            config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
            items[:] = [item for item in items if item.nodeid not in left_out]

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: object) -> None:
        """Hand the seed to a worker of pytest-xdist, which gets the command line alone."""
        node.workerinput["seed"] = self.run_seed

    def pytest_report_header(self) -> str:
        return f"seed: {self.run_seed} (draw the same again: --seed {self.run_seed})"

    @pytest.fixture
    def seed(self, request: pytest.FixtureRequest) -> int:
        """The test's own seed in this run, in [0, 2^31), for its own generators."""
        return derived(self.run_seed, f"{request.node.nodeid} seed")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        _begin(derived(self.run_seed, item.nodeid))
        item.stash[STATES] = get_states()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        names = set(getattr(item, "fixturenames", ()))
        if _drew or "seed" in names or names & self.drawing_fixtures or get_states() != item.stash[STATES]:
            item.user_properties.append((DRAWS, item.nodeid))
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> Iterator[object]:
        if fixturedef.scope == "function":
            return (yield)
        global _seed, _drew
        before, outer = get_states(), (_seed, _drew)
        param = getattr(request, "param_index", "")
        _begin(derived(self.run_seed, f"{request.node.nodeid} {fixturedef.argname} {param}"))
        start = get_states()
        try:
            return (yield)
        finally:
            if _drew or get_states() != start:
                self.drawing_fixtures.add(fixturedef.argname)
            _seed, _drew = outer
            set_states(before)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        reports = [r for kind in ("failed", "error") for r in terminalreporter.stats.get(kind, [])]
        commands = {}  # in order, without repetition
        for report in reports:
            if not hasattr(report, "keywords"):  # a module that could not be collected
                continue
            exhaustive = " -m exhaustive" if "exhaustive" in report.keywords else ""
            commands[f"python -m pytest -n 0{exhaustive} --seed {self.run_seed} {shlex.quote(report.nodeid)}"] = None
        if commands:
            terminalreporter.section("the same draws again")
            for command in commands:
                terminalreporter.write_line(command)


def addoption(parser: pytest.Parser) -> None:
    """Add `--seed` and `--every`."""
    parser.addoption("--every", action="store_true", help="all cases of tests that otherwise draw some of them")
    parser.addoption("--seed", type=int, help="the seed that all tests draw from; default: a new one, which is printed")


def configure(config: pytest.Config) -> None:
    """Choose the run's seed, or take the one that pytest-xdist brings to a worker, and start the plugin."""
    if hasattr(config, "workerinput"):
        config.option.seed = config.workerinput["seed"]
    elif config.option.seed is None:
        config.option.seed = secrets.randbits(31)
    secrets.randbits = random.getrandbits
    config.pluginmanager.register(Seeds(config.option.seed), "seeds")
