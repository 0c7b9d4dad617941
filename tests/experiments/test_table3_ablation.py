"""TODO DOC"""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("gains", "said"),
    [([1.0, 1.2, 0.8], "reproduced (+1.00"), ([-1.0, -1.2, -0.8], "contradicted (-1.00"), ([1.0, -1.0, 0.1], "not")],
)
def test_verdicts(gains, said):
    """Mutants: better and worse swapped, the verdicts swapped, an interval that holds zero taken for a result."""
    from experiments.harness.rows import Results, Row
    from experiments.table3_ablation import CLAIMS, SHARES, verdicts

    def samples(values):
        return [{"psnr_db": value} for value in values]

    rows = {}
    for site in ("output", "blocks"):
        for share in SHARES:
            for label in {label for claim in CLAIMS for label in claim[1:]}:
                rows[Row(label, (), round(share * 6), site).key] = samples([30.0, 20.0, 25.0])
            rows[Row("policy", (), round(share * 6), site).key] = samples([30 + gains[0], 20 + gains[1], 25 + gains[2]])
    lines = verdicts(Results([], 1, rows, {}, []), 6)
    policy = [line for line in lines if line.startswith("the policy helps")]
    assert len(policy) == 4 and all(f": {said}" in line for line in policy), policy
    assert all("not decidable here (+0.00" in line for line in lines if line.startswith("rectification"))
