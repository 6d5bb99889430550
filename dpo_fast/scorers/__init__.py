"""Scorers: each is a module of this folder with a function `load(name, loading)` and the dict REPOSITORIES, scorer ->
the repositories its files come from. To add one, add a module and a row in MODULE_OF. If scores depend on more than
files and dtype, the module also has a function `more_facts()`."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from dpo_fast import __version__
from dpo_fast.errors import BadInput
from dpo_fast.hub_revisions import revision_of


@dataclass(frozen=True)
class Scorer:
    """Scores how good images are for their prompts."""

    score: Callable[[torch.Tensor, list[str]], torch.Tensor]  # uint8 [N,3,H,W], N prompts -> fp64 [N] on the CPU
    check: Callable[[list[str]], None] = lambda prompts: None  # raises BadInput for a prompt it cannot judge


@dataclass(frozen=True)
class Loading:
    """Where a scorer's model runs, in which precision, and where its files are."""

    device: torch.device
    dtype: torch.dtype
    where: Path | None  # a folder that holds repositories as OWNER/NAME; None: the hub
    cache_dir: str | None
    token: str | None


MODULE_OF = {
    "quality": "shapes",
    "faithfulness": "shapes",
    "right": "shapes",
    "appeal": "shapes",
    "pickscore": "pickscore",
    "hpsv2": "hpsv2",
    "hpsv2.1": "hpsv2",
    "imagereward": "imagereward",
    "clip": "clip",
    "aesthetic": "aesthetic",
}


def check_names(names: Sequence[str]) -> None:
    """Raise BadInput for an unknown scorer."""
    for name in names:
        if name not in MODULE_OF:
            raise BadInput(f"there is no scorer {name!r}; choose from {', '.join(MODULE_OF)}")


def default_dtype(device: torch.device) -> torch.dtype:
    """The dtype that models compute in by default: fp32 on a CPU, fp16 elsewhere."""
    return torch.float32 if device.type == "cpu" else torch.float16


def load_scorer(
    name: str,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    where: str | Path | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Scorer:
    """Load the scorer `name`, ready to run on `device`.

    dtype: of the model; None: fp32 on a CPU, fp16 elsewhere (it rounds eight times finer than bf16).
    where: a folder that holds the model's repositories as OWNER/NAME (`hf download OWNER/NAME --local-dir
    FOLDER/OWNER/NAME`); None: the hub, with cache_dir and token as in transformers.
    The built-in world's scorers have no files and ignore everything but the name.

    Raises BadInput, in one line, for an unknown name and for files that cannot be found, read or trusted.
    """
    check_names([name])
    device = torch.device(device)
    dtype = dtype or default_dtype(device)
    loading = Loading(device, dtype, None if where is None else Path(where), cache_dir, token)
    return _module(name).load(name, loading)


def facts(
    name: str,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    where: str | Path | None = None,
    cache_dir: str | None = None,
) -> dict[str, str]:
    """Return the cache key of a scorer's scores: the properties that decide them, for `load_scorer`'s arguments.

    "files" is a digest of the scorer's files under `where` (names, sizes and modification times), or for the hub the
    commits that its cache has resolved: before the scorer is loaded, these can be missing or older than those it will
    use. Raises BadInput for an unknown name.
    """
    check_names([name])
    repositories = _module(name).REPOSITORIES[name]
    if where is not None:
        found = [_digest(Path(where), repositories)] if repositories else []
    else:
        found = [f"{repository}@{revision_of(repository, cache_dir=cache_dir)}" for repository in repositories]
    return {
        "scorer": name,
        "dtype": str(dtype or default_dtype(torch.device(device))).removeprefix("torch."),
        "files": ", ".join(found) or "none",
        "dpo_fast": __version__,
        **getattr(_module(name), "more_facts", dict)(),
    }


def provenance(
    name: str,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    where: str | Path | None = None,
    cache_dir: str | None = None,
) -> dict[str, object]:
    """Return what results record about a scorer that `load_scorer` made from the same arguments.

    These are its `facts` without the name, and with "revisions" (repository -> `revision_of` it) in place of "files":
    the same for the same files on every machine.

    Raises BadInput for an unknown name.
    """
    found: dict[str, object] = {**facts(name, device, dtype=dtype, where=where, cache_dir=cache_dir)}
    del found["scorer"], found["files"]
    revisions = {}
    for repository in _module(name).REPOSITORIES[name]:
        place = repository if where is None else Path(where) / repository
        revisions[repository] = revision_of(place, cache_dir=cache_dir)
    return {**found, "revisions": revisions}


def _module(name: str) -> ModuleType:
    return import_module(f"{__name__}.{MODULE_OF[name]}")


def _digest(where: Path, repositories: Sequence[str]) -> str:
    """Return a digest of all files of the repositories except the downloader's notes, which change with every check."""
    digest = hashlib.blake2b(digest_size=16)
    for repository in repositories:
        folder = where / repository
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if inside.parts[0] != ".cache" and path.is_file():
                status = path.stat()
                line = f"{repository} {inside.as_posix()} {status.st_size} {status.st_mtime_ns}\n"
                digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()
