"""Turn what the hub's client raises for a repository of a model into one line for the user."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dpo_fast.errors import BadInput


@contextmanager
def hub_errors(path: str, revision: str | None, file: str, advice: str) -> Iterator[None]:
    """Raise BadInput for the hub's errors within the block, which fetches or asks for `file` of the repository `path`.

    advice: what to name instead if the repository has no such file. Errors of other libraries, such as those of a
    connection that the client does not translate, pass through.
    """
    try:
        yield
    except HFValidationError as error:
        raise BadInput(f"{path} is no folder, file or hub id (owner/name): check the spelling") from error
    except GatedRepoError as error:
        raise BadInput(f"{path} is gated: accept https://huggingface.co/{path}, then hf auth login") from error
    except RepositoryNotFoundError as error:
        raise BadInput(f"{path} is no folder and no model on the hub: check the spelling, or hf auth login") from error
    except RevisionNotFoundError as error:
        raise BadInput(f"{path} has no revision {revision!r}: see its branches on the hub") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:  # before EntryNotFoundError, its parent
        raise BadInput(f"{path} is no folder and the hub cannot be reached: name a downloaded folder") from error
    except EntryNotFoundError as error:
        raise BadInput(f"{path} has no {file} on the hub: {advice}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise BadInput(f"{path} could not be fetched from the hub (status {status}): try again later") from error
