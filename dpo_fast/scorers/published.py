"""Load the files of published models, from the hub or a folder, without running any code in them, and make a Scorer of
what a model computes."""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dpo_fast.errors import BadInput
from dpo_fast.files import regular_files
from dpo_fast.models.load_errors import bad_input
from dpo_fast.models.untrusted import check_part
from dpo_fast.scorers import Loading, Scorer

ADVICE = "take the published files, or check the connection and the token"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)


def repository(name: str, loading: Loading, files: Sequence[str]) -> Path:
    """Return a local folder with the given `files` (patterns) of the repository OWNER/NAME, none of which names code.

    Raises BadInput if the files are not available or name code.
    """
    if loading.where is None:
        with bad_input(f"the files of {name} cannot be fetched", ADVICE):
            where = {"cache_dir": loading.cache_dir, "token": loading.token}
            folder = Path(snapshot_download(name, allow_patterns=list(files), **where))
    else:
        folder = _local(name, loading.where)
    check_part(folder)
    return folder


def file(name: str, file_name: str, loading: Loading) -> Path:
    """Return the local path of one file of the repository OWNER/NAME. Raises BadInput if it is not available."""
    if loading.where is None:
        with bad_input(f"{file_name} of {name} cannot be fetched", ADVICE):
            return Path(hf_hub_download(name, file_name, cache_dir=loading.cache_dir, token=loading.token))
    path = _local(name, loading.where) / file_name
    if not path.is_file():
        raise BadInput(f"{path} is no file: hf download {name} {file_name} --local-dir {path.parent}")
    return path


def tokenizer(name: str, kind: type[PreTrainedTokenizerBase], tokens: int, loading: Loading) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the repository OWNER/NAME as class `kind`.

    Raises BadInput if it cannot be loaded or has fewer than `tokens` tokens.
    """
    folder = repository(name, loading, TOKENIZER_FILES)
    with bad_input(f"the tokenizer of {folder} cannot be loaded", ADVICE):
        found = kind.from_pretrained(folder)
    if len(found) < tokens:  # transformers makes an empty one where files are missing
        raise BadInput(f"the tokenizer of {folder} knows {len(found)} tokens of {tokens}: take the published files")
    return found


def _local(name: str, where: Path) -> Path:
    folder = where / name
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder: hf download {name} --local-dir {folder}")
    regular_files(folder)
    return folder


def fill(
    module: nn.Module,
    path: Path,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    under: str | None = None,
    others: bool = False,
) -> None:
    """Fill every parameter of `module` from the tensors that torch.save wrote to `path`.

    convert: maps the file's names and tensors to the module's. under: the key in the file's dict that holds them; None:
    the dict itself does. others: the file may hold further tensors, as when its authors load it with strict=False.

    Raises BadInput if the file is missing a tensor of the module, has one of another shape or, unless `others`, has
    further tensors. A pickle with code in it is refused, not run.
    """
    with bad_input(f"{path} is not the published file", "download it again"):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise BadInput(f"{path} holds more than weights and could run code: take the published file") from error
        except EOFError as error:
            raise ValueError("it ends too early") from error
        state = content if under is None else content[under]
        missing, unexpected = module.load_state_dict(convert(state), strict=False)
        if missing or (unexpected and not others):
            found = [
                f"{len(names)} tensor{' is' if len(names) == 1 else 's are'} {what}"
                f" ({', '.join(sorted(names)[:3])}{', ...' * (len(names) > 3)})"
                for names, what in ((missing, "missing"), ([] if others else unexpected, "unexpected"))
                if names
            ]
            raise ValueError(" and ".join(found))


def of_model(
    compute: Callable[[Tensor, list[str]], Tensor],  # uint8 [N,3,H,W], N prompts -> [N]
    check: Callable[[list[str]], None] = lambda prompts: None,
) -> Scorer:
    """Return a Scorer that calls `compute` without gradients and returns its scores in fp64 on the CPU."""

    @torch.no_grad()
    def score(images: Tensor, prompts: list[str]) -> Tensor:
        assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3, images.shape
        assert len(images) == len(prompts), f"{len(images)} images, {len(prompts)} prompts"
        return compute(images, prompts).double().cpu()

    return Scorer(score, check)
