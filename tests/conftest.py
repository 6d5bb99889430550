"""For all tests: one seed a run, one tiny pipeline of each family a session, and nothing from the network."""

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background; the tests send themselves Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
# One thread here and in the processes that tests start: sums over other numbers of threads round differently.
os.environ["OMP_NUM_THREADS"] = "1"
# Latents and embeddings are kept between tests, as between runs, but never beside the user's own.
os.environ["DPO_FAST_CACHE"] = tempfile.mkdtemp(prefix="dpo_fast-cache-")
# Compiled programs are shared by all workers of pytest-xdist.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = (
    os.environ["TORCHINDUCTOR_CACHE_DIR"]
    if "PYTEST_XDIST_WORKER" in os.environ
    else tempfile.mkdtemp(prefix="dpo_fast-compiled-")
)

import pytest

from tests.helpers import pipelines, seeds
from tests.helpers.pairs import write_pickapic


def pytest_addoption(parser: pytest.Parser) -> None:
    seeds.addoption(parser)


def pytest_configure(config: pytest.Config) -> None:
    seeds.configure(config)


@pytest.fixture(autouse=True)
def quiet_log() -> None:
    """Each test begins without the log that a command in this process shows (`cli.show_log`)."""
    logger = logging.getLogger("dpo_fast")
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["DPO_FAST_CACHE"], ignore_errors=True)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Signals as in a process that a terminal started: a job in the background, or under nohup, ignores some."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def sd15_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1.5 pipeline; do not write in the folder."""
    return pipelines.make_sd15(tmp_path_factory.mktemp("pipelines") / "sd15")


@pytest.fixture(scope="session")
def sdxl_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL pipeline; do not write in the folder."""
    return pipelines.make_sdxl(tmp_path_factory.mktemp("pipelines") / "sdxl")


@pytest.fixture(scope="session")
def turbo_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL-Turbo pipeline; do not write in the folder."""
    return pipelines.make_turbo(tmp_path_factory.mktemp("pipelines") / "turbo")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs of random images with distinct captions, in Pick-a-Pic's columns."""
    return write_pickapic(tmp_path_factory.mktemp("pairs") / "pairs.parquet", n=12, size=72)
