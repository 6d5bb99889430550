"""The memory that a process may use: of the host, within the limits of its control groups."""

from pathlib import Path

import pytest
import torch

from dpo_fast.choices import machine
from dpo_fast.choices.machine import Memory, memory_of

MIB = 2**20


VERSION_2 = ("memory.max", "memory.current", "memory.stat")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")


def written(folder: Path, names: tuple[str, str, str], limit: str, used: int, field: str, returned: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    texts = (limit, str(used), f"anon 5\n{field} {returned}")
    for name, text in zip(names, texts, strict=True):
        (folder / name).write_text(text + "\n")


def test_every_group_above_the_process_limits_it(tmp_path):
    (tmp_path / "groups").write_text("0::/slurm/job\n")
    root = tmp_path / "fs"
    written(root / "slurm", VERSION_2, str(100 * MIB), 30 * MIB, "inactive_file", 10 * MIB)
    written(root / "slurm" / "job", VERSION_2, "max", 0, "inactive_file", 0)
    assert list(machine._limits_of_groups(tmp_path / "groups", root)) == [Memory(80 * MIB, 100 * MIB)]
    written(root, VERSION_2, str(50 * MIB), 60 * MIB, "inactive_file", 0)  # a container's own
    assert list(machine._limits_of_groups(tmp_path / "groups", root))[1] == Memory(0, 50 * MIB)


def test_groups_of_version_1(tmp_path):
    (tmp_path / "groups").write_text("5:cpu,cpuacct:/docker\n4:memory:/docker\n")
    folder = tmp_path / "fs" / "memory" / "docker"
    written(folder, VERSION_1, str(64 * MIB), 20 * MIB, "total_inactive_file", 4 * MIB)
    assert list(machine._limits_of_groups(tmp_path / "groups", tmp_path / "fs")) == [Memory(48 * MIB, 64 * MIB)]


def test_without_groups_there_is_no_limit(tmp_path):
    assert list(machine._limits_of_groups(tmp_path / "none", tmp_path)) == []


def test_the_memory_of_the_host_within_its_limits(monkeypatch):
    monkeypatch.setattr(machine, "_host_memory", lambda: Memory(8, 16))
    limits: list[Memory] = []
    monkeypatch.setattr(machine, "_limits_of_groups", lambda *_: limits)
    assert memory_of(torch.device("cpu")) == (8, 16)
    limits.append(Memory(9, 12))
    assert memory_of(torch.device("cpu")) == (8, 12)
    monkeypatch.setattr(machine, "_host_memory", lambda: None)
    assert memory_of(torch.device("cpu")) is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="no /proc here")
def test_the_host_has_memory():
    memory = memory_of(torch.device("cpu"))
    assert 0 < memory.free <= memory.total
