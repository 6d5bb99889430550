"""Killed or told to stop at any moment, a command that is started again ends with the files of one left in peace."""

import signal

import pytest

from tests.faults.commands import COMMANDS, contents, differences

pytestmark = pytest.mark.faults


@pytest.mark.drawn(9)
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_before_or_within_file_system_calls(checks, chance, name, number):
    finding = checks.killed(name, chance)
    assert not finding.wrong, str(finding)
    assert finding.kills


@pytest.mark.drawn(9)
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda sent: sent.name)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_at_any_moment(checks, chance, name, sent):
    finding = checks.at_any_moment(name, chance, sent)
    assert not finding.wrong, str(finding)


def test_what_differs_is_seen(checks):
    """The comparison that the tests here rest on."""
    case = checks.case("generate")
    assert case.run().status == 0
    whole = contents(case.folder)
    images = sorted((case.folder / "out" / "base").iterdir())
    data = bytearray(images[0].read_bytes())
    data[len(data) // 2] ^= 1
    images[0].write_bytes(data)
    images[1].unlink()
    (case.folder / "out" / ".tmp-1").touch()
    found = differences(whole, contents(case.folder))
    assert found == [
        f"missing: out/base/{images[1].name}", "left behind: out/.tmp-1", f"differs: out/base/{images[0].name}"
    ]  # fmt: skip
