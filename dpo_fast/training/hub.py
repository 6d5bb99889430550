"""Uploading a finished run to the Hugging Face hub."""

from pathlib import Path

import yaml
from huggingface_hub import HfApi

from dpo_fast.checksums import signed_text
from dpo_fast.errors import BadInput
from dpo_fast.files import read_text
from dpo_fast.hub_revisions import public_name

CONFIG = "config.yaml"  # uploaded with `public_name`s
NOT_UPLOADED = ["checkpoint-*", "logs/*", ".tmp-*", ".lock*", ".publishing/*", CONFIG]

# Any exception of the hub's client is caught: the HTTP library under it, whose errors it passes on, has changed twice.


def check_login(token: str | None) -> str:
    """The name of the account that an upload will use. Raises BadInput without one, or without a way to the hub."""
    try:
        return HfApi(token=token).whoami()["name"]
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise BadInput(
            f"--push_to_hub: cannot log in to the hub ({reason}); run `hf auth login`, or give --hub_token"
        ) from error


def public_config(config: dict[str, object]) -> dict[str, object]:
    """A configuration as others may read it: of this disk's paths the last part alone."""
    return {name: public_name(value) if isinstance(value, str) else value for name, value in config.items()}


def push(folder: Path, repository: str | None, token: str | None) -> str:
    """Upload `folder` without its checkpoints, and its settings without this disk's paths; return the address.

    Raises BadInput when the upload fails; the run stays whole in `folder`.
    """
    api = HfApi(token=token)
    try:
        name = api.create_repo(repository or folder.resolve().name, exist_ok=True).repo_id
        if (folder / CONFIG).is_file():
            config = public_config(yaml.safe_load(read_text(folder / CONFIG)))
            text = signed_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo=CONFIG, repo_id=name)
        return str(api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=NOT_UPLOADED))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise BadInput(
            f"--push_to_hub: the upload failed ({reason}), the result is safe in {folder}; upload it with"
            f" `hf upload {repository or folder.name} {folder}`"
        ) from error
