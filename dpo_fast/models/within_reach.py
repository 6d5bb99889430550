"""Whether a model's files are on this machine or can be fetched, asked before any long work and without any weights.

A repository of the hub that is whole in its cache needs no network. Any other is asked for one small file.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError

from dpo_fast.errors import BadInput, one_line
from dpo_fast.files import exists
from dpo_fast.models.hub_errors import hub_errors
from dpo_fast.models.kinds import kind_of
from dpo_fast.models.load import check_supplied, config_source, refuse_pickle
from dpo_fast.models.lora import WEIGHT_NAME
from dpo_fast.models.merging import local_lora_file
from dpo_fast.models.source import ModelSource
from dpo_fast.models.untrusted import INDEX, WITH_WEIGHTS, check_pipeline, read_index

SECONDS = 10.0  # that the hub has to answer
_CONFIGS = (INDEX, "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in ("unet", "vae")))


@cache
def check_within_reach(source: ModelSource) -> None:
    """Raise BadInput unless everything that `source` names is on this machine, or the hub answers for it.

    One line names all that is missing, each with the flag that cures it. Raises BadInput also for a model that
    `load_family` would refuse by its index, its scheduler or the names of its files. Remembers what it found in order.
    """
    refuse_pickle(source.path)
    if exists(Path(source.path)):
        check_supplied(source)
    if problems := [problem for one in _repositories(source) if (problem := _problem(one, source))]:
        raise BadInput("; ".join(problems))
    if source.merged is not None:
        local_lora_file(source.merged)
    kind_of(source.path, source.hub())
    if Path(source.path).is_dir():
        check_pipeline(Path(source.path), weights=True)


@dataclass(frozen=True)
class _Repository:
    """A repository of the hub that a model is read from."""

    name: str
    what: str  # in words
    files: tuple[str, ...]  # small ones, of which it has at least one
    is_whole: Callable[[Path], bool]  # whether a snapshot of it in the cache has all that is needed
    remedy: str
    revision: str | None = None


def _repositories(source: ModelSource) -> Iterator[_Repository]:
    if source.path.endswith(".safetensors"):
        if exists(Path(source.path)) and not _is_local(name := config_source(source.path, source.single_file_config)):
            yield _Repository(
                name,
                f"the configuration that {source.path} is read with, of {name},",
                (INDEX,),
                lambda folder: all((folder / file).is_file() for file in _CONFIGS),
                f"name the folder of such a pipeline with --single_file_config, or fetch it with `hf download {name}"
                " --include '*.json' '*.txt'`",
            )
    elif not _is_local(source.path):
        yield _Repository(
            source.path,
            f"the model {source.path}",
            (INDEX,),
            _has_weights,
            "name a downloaded folder with --pretrained_model_name_or_path, or fetch it with `hf download"
            f" {source.path}`",
            source.revision,
        )
    if source.vae_path is not None and not _is_local(source.vae_path):
        yield _Repository(
            source.vae_path,
            f"the VAE {source.vae_path}",
            ("config.json", "vae/config.json"),
            lambda folder: any(any((folder / part).glob("*.safetensors")) for part in ("", "vae")),
            "name a downloaded folder or file with --pretrained_vae_model_name_or_path (None: the model's own), or"
            f" fetch it with `hf download {source.vae_path}`",
        )
    if source.merged is not None and not _is_local(source.merged) and not source.merged.endswith(".safetensors"):
        yield _Repository(
            source.merged,
            f"the LoRA {source.merged}",
            (WEIGHT_NAME, "README.md", ".gitattributes"),
            lambda folder: any(folder.glob("*.safetensors")),
            f"name a file with --init_lora, or fetch it with `hf download {source.merged}`",
        )


def _problem(repository: _Repository, source: ModelSource) -> str | None:
    """Say why a repository can be neither read nor fetched, and what to do; None if it can.

    Raises BadInput for a name that no repository has, and for one that the hub refuses.
    """
    revision, advice = repository.revision, f"check what {repository.name} is"
    for file in repository.files:
        with hub_errors(repository.name, revision, file, advice):
            found = try_to_load_from_cache(repository.name, file, cache_dir=source.cache_dir, revision=revision)
        if isinstance(found, str) and repository.is_whole(Path(found).parents[file.count("/")]):
            return None
    if constants.HF_HUB_OFFLINE:
        return _out_of_reach(repository, source, "HF_HUB_OFFLINE is set")
    try:
        with hub_errors(repository.name, revision, repository.files[0], advice):
            _ask(repository, source.token)
    except (BadInput, KeyboardInterrupt):
        raise
    except Exception as error:  # of the HTTP library, which has changed twice
        return _out_of_reach(repository, source, f"the hub cannot be reached ({one_line(error, 100)})")
    return None


def _ask(repository: _Repository, token: str | None) -> None:
    """Ask the hub whether the repository has one of its files, without fetching it. Raises the hub client's errors."""
    missing = None
    for file in repository.files:
        try:
            url = hf_hub_url(repository.name, file, revision=repository.revision)
            get_hf_file_metadata(url, token=token, timeout=SECONDS)
            return
        except EntryNotFoundError as error:
            missing = error
    raise missing


def _out_of_reach(repository: _Repository, source: ModelSource, why: str) -> str:
    kept = source.cache_dir or constants.HF_HUB_CACHE
    return f"{repository.what} is not, or not whole, in the hub's cache ({kept}), and {why}: {repository.remedy}"


def _is_local(name: str) -> bool:
    return exists(Path(name))


def _has_weights(folder: Path) -> bool:
    """Whether a snapshot of a pipeline has the weights of all its parts."""
    index = read_index(folder, folder / INDEX)
    parts = [part for part in WITH_WEIGHTS if index.get(part, [None, None]) != [None, None]]
    return all(any((folder / part).glob("*.safetensors")) for part in parts)
