"""Uploading, with the hub's client replaced."""

import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError

from dpo_fast.checksums import check_text, signed_text
from dpo_fast.config import TrainConfig, to_yaml
from dpo_fast.errors import BadInput
from dpo_fast.training import hub


class FakeApi:
    """Knows one account; keeps what it is asked to upload."""

    fault: Exception | None = None
    uploaded: dict = {}  # noqa: RUF012

    def __init__(self, token: str | None) -> None:
        self.token = token

    def whoami(self) -> dict:
        if self.fault:
            raise self.fault
        return {"name": f"owner of {self.token}"}

    def create_repo(self, name: str, *, exist_ok: bool) -> SimpleNamespace:
        assert exist_ok
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str) -> None:
        self.uploaded[path_in_repo] = path_or_fileobj.decode()

    def upload_folder(self, *, repo_id: str, folder_path: Path, ignore_patterns: list[str]) -> str:
        if self.fault:
            raise self.fault
        files = [str(p.relative_to(folder_path)) for p in sorted(Path(folder_path).rglob("*")) if p.is_file()]
        kept = [f for f in files if not any(fnmatch.fnmatch(f, pattern) for pattern in ignore_patterns)]
        self.uploaded.update(repo_id=repo_id, files=kept, token=self.token)
        return f"https://huggingface.co/{repo_id}"


@pytest.fixture
def api(monkeypatch) -> type[FakeApi]:
    fake = type("Api", (FakeApi,), {"uploaded": {}})
    monkeypatch.setattr(hub, "HfApi", fake)
    return fake


@pytest.fixture
def folder(tmp_path) -> Path:
    names = ["README.md", "unet/a.safetensors", "checkpoint-5/weights.safetensors", "logs/events/x", ".tmp-a/b"]
    names += [".lock", ".lock.lease", "evaluation/images/base/a.png", "evaluation/evaluation.json"]
    names += [f"votes.sqlite{end}" for end in ("", "-wal", "-shm", ".images/ab.jpg")]  # with voters' names
    for name in ["metrics.jsonl", "samples/step-1.png", "checkpoint-5/sub/x", *names]:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()
    return tmp_path / "run"


def test_the_account_is_found_before_training(api):
    assert hub.check_login("t") == "owner of t"


@pytest.mark.parametrize(
    "repository, expected", [("me/aligned", "me/aligned"), ("aligned", "me/aligned"), (None, "me/run")]
)
def test_the_result_is_uploaded_without_checkpoints(api, folder, repository, expected, monkeypatch):
    monkeypatch.chdir(folder)
    assert hub.push(Path("."), repository, "t") == f"https://huggingface.co/{expected}"
    files = ["README.md", "metrics.jsonl", "samples/step-1.png", "unet/a.safetensors"]
    assert api.uploaded == {"repo_id": expected, "files": files, "token": "t"}


class ConnectError(Exception):
    """As the hub's HTTP library raises it: neither an OSError nor one of the hub's own."""


@pytest.mark.parametrize(
    "fault", [LocalTokenNotFoundError("no\ntoken"), ConnectError("no\nroute"), OSError("no\ndisk")]
)
def test_every_fault_of_the_client_is_one_line(api, folder, fault):
    api.fault = fault
    with pytest.raises(BadInput, match=r"cannot log in to the hub \(no \w+\); run `hf auth login`"):
        hub.check_login(None)
    with pytest.raises(BadInput, match=r"the upload failed \(no \w+\), .* safe in .*run; .*`hf upload me/a "):
        hub.push(folder, "me/a", None)
    assert (folder / "README.md").exists()


def test_the_settings_are_uploaded_without_this_disks_paths(api, folder, tmp_path):
    config = TrainConfig(pretrained_model_name_or_path=str(folder), dataset_name="owner/pairs", eval_prompts=Path("a"))
    (folder / "config.yaml").write_text(signed_text(to_yaml(config)))
    hub.push(folder, "me/a", None)
    assert "config.yaml" not in api.uploaded["files"]
    text = api.uploaded["config.yaml"]
    assert str(tmp_path) not in text
    values = yaml.safe_load(text)
    assert (values["pretrained_model_name_or_path"], values["dataset_name"]) == ("run", "owner/pairs")
    copied = tmp_path / "config.yaml"
    copied.write_text(text)
    check_text(copied, "never")  # its checksum is of what was uploaded
    assert str(folder) in (folder / "config.yaml").read_text()  # here a run can go on and be evaluated
