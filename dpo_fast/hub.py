"""Uploading a finished run to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from dpo_fast.errors import BadInput

NOT_UPLOADED = ["checkpoint-*/*", "checkpoint-*", "logs/*", ".tmp-*"]


def check_login(token: str | None) -> str:
    """The name of the account that an upload will use. Raises BadInput when there is none or the hub cannot be reached."""
    try:
        return HfApi(token=token).whoami()["name"]
    except (LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise BadInput(
            f"--push_to_hub: cannot log in to the hub ({reason}); run `hf auth login`, or give --hub_token"
        ) from error


def push(folder: Path, repository: str | None, token: str | None) -> str:
    """Upload `folder` without its checkpoints and return the address.

    Raises BadInput when the upload fails; the run stays whole in `folder`.
    """
    api = HfApi(token=token)
    try:
        name = api.create_repo(repository or folder.resolve().name, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=NOT_UPLOADED))
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise BadInput(
            f"--push_to_hub: the upload failed ({reason}), the result is safe in {folder}; upload it with"
            f" `hf upload {repository or folder.name} {folder}`"
        ) from error
