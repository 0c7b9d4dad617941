"""Every key with every kind of bad value is refused with its name: a part of them here, all with -m slow."""

from __future__ import annotations

from collections import Counter

import pytest

from tests import bad_inputs

EVERY = 23


def check(found: list[bad_inputs.Answer]) -> None:
    assert [one for one in found if one.verdict == "bad"] == []
    counts = Counter(one.verdict for one in found)
    assert counts["good"] > 0.97 * len(found), [one for one in found if one.verdict == "weak"]


@pytest.mark.slow
def test_a_part_of_the_bad_values():
    """Mutant: a key without a check."""
    check(bad_inputs.answers(EVERY))


@pytest.mark.slow
def test_all_bad_values():
    check(bad_inputs.answers())
