"""Random programs on a whole bank against a model of plain dicts; `make stateful` runs many more."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from bank_machine import BankMachine, ObjectBankMachine

# A program takes a second; the profiles' counts are for examples that take a millisecond.
_SETTINGS = settings(
    max_examples=max(10, (settings.default or settings()).max_examples // 5),
    stateful_step_count=50,
    suppress_health_check=[HealthCheck.too_slow],
)
_MARKS = [pytest.mark.slow, pytest.mark.timeout(1800)]

TestBank = BankMachine.TestCase
TestBank.settings = _SETTINGS
TestBank.pytestmark = _MARKS  # type: ignore[attr-defined]

TestObjectBank = ObjectBankMachine.TestCase
TestObjectBank.settings = _SETTINGS
TestObjectBank.pytestmark = _MARKS  # type: ignore[attr-defined]
