"""TODO DOC"""

from __future__ import annotations

import pytest

from analysis import plots


def test_labels_of_the_figures_are_kept_apart():
    """Mutants: labels on top of each other, in another order, or pushed out of the panel."""
    made = plots._spread([0.1, 0.11, 0.11, 0.9, 0.99, 0.99, 1.0], apart=0.1)
    assert made == pytest.approx([0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1.0])
