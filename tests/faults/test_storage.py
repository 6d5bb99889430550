"""A disk that answers with errors: one line that names the path, nothing half-written, and later the same results."""

import pytest

from tests.faults.checks import ERRNOS
from tests.faults.commands import COMMANDS

pytestmark = pytest.mark.faults


@pytest.mark.drawn(24)
@pytest.mark.parametrize("kind, error", [(kind, error) for kind in ERRNOS for error in ERRNOS[kind]])
def test_an_error_at_a_file_system_call(checks, chance, kind, error):
    """Every error at every kind of call, each in one of the commands that make it."""
    names = [name for name in COMMANDS if (kind, error, False) in checks.errors(name)]
    if not names:
        pytest.skip(f"no command makes a call of the kind {kind}")
    name = chance.choice(names)
    finding = checks.disk_error(name, checks.fault(name, kind, error, chance))
    assert not finding.wrong, str(finding)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_input_that_cannot_be_read(checks, chance, name):
    kind, error, _ = chance.choice([found for found in checks.errors(name) if found[2]])
    fault = checks.fault(name, kind, error, chance, of_inputs=True)
    finding = checks.disk_error(name, fault, of_inputs=True)
    assert not finding.wrong, str(finding)


@pytest.mark.parametrize("name", COMMANDS)
def test_writes_that_take_only_a_part(checks, name):
    finding = checks.short_writes(name)
    assert not finding.wrong, str(finding)
