"""Uploading a finished run to the Hugging Face hub."""

from pathlib import Path

import yaml
from huggingface_hub import HfApi

from dpo_fast.checksums import signed_text
from dpo_fast.errors import BadInput
from dpo_fast.files import read_text
from dpo_fast.hub_revisions import public_name

CONFIG = "config.yaml"  # uploaded with paths shortened by `public_name`
VOTES = ["*.sqlite", "*.sqlite-*", "*.sqlite.images/*"]  # with voters' names, whatever the file is called
NOT_UPLOADED = ["checkpoint-*", "evaluation/*", "logs/*", ".tmp-*", ".lock*", ".publishing/*", *VOTES, CONFIG]

# Every exception of the hub client is caught: it passes on the errors of its HTTP library, which has changed twice.


def check_login(token: str | None) -> str:
    """Return the account name that an upload will use. Raises BadInput without a login or a connection to the hub."""
    try:
        return HfApi(token=token).whoami()["name"]
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise BadInput(
            f"--push_to_hub: cannot log in to the hub ({reason}); run `hf auth login`, or give --hub_token"
        ) from error


def public_config(config: dict[str, object]) -> dict[str, object]:
    """Return a configuration fit for publication: only the last part of each local path is kept."""
    return {name: public_name(value) if isinstance(value, str) else value for name, value in config.items()}


def push(folder: Path, repository: str | None, token: str | None) -> str:
    """Upload `folder` without its checkpoints and people's votes, and its settings without local paths; return the URL.

    Raises BadInput when the upload fails; the run in `folder` stays intact.
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
