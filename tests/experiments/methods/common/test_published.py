"""Published constants are for their model and steps."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

import erta
from experiments.methods.common.published import FILE, published
from tests.pipelines import build_pipe


def test_published_constants_are_for_their_model_and_steps(tmp_path):
    """Mutants: chosen by name, another model's handed out, another number of steps accepted."""
    pipe = build_pipe()
    with pytest.raises(
        erta.ErtaError, match="for Wan2.1-T2V-1.3B, .*, FLUX.1-dev, .*CogVideoX-5B, Open-Sora 1.2, not for this Wan"
    ):
        published("teacache", pipe, 50)
    known = yaml.safe_load(FILE.read_text())
    entries = [entry for method in known.values() for entry in method]
    assert all(entry["source"] and entry["model"]["class"] and entry["num_steps"] for entry in entries)
    assert all({len(ratios) for ratios in e["ratios"].values()} == {e["num_steps"]} for e in known["magcache"])
    wan, flux, hunyuan, open_sora = known["magcache"]
    assert (flux["num_steps"], hunyuan["ratios"]["cond"][-1]) == (28, 0.76592)
    assert wan["ratios"]["cond"][1:3] == [1.0124, 1.00166] and wan["ratios"]["uncond"][-1] == 0.81939
    # Open-Sora's are the square roots of 0.93359, 0.96484, 0.99609, 1
    np.testing.assert_allclose(open_sora["ratios"]["cond_uncond"][1:5], [0.96622, 0.98226, 0.99804, 1], atol=1e-5)
    # at 0.05, by hand: 0.01498 - 0.16389 + 0.50333 - 0.41493 + 0.13789
    assert np.polyval(known["teacache"][0]["coefficients"], 0.05) == pytest.approx(0.07738, abs=1e-5)
    wan["model"] = {"class": "WanTransformer3DModel", "num_layers": 2, "num_attention_heads": 2}
    file = tmp_path / "constants.yaml"
    file.write_text(yaml.safe_dump(known))
    assert published("magcache", pipe, 50, file)["ratios"]["cond"][0] == 1.0
    with pytest.raises(erta.ErtaError, match="for 50 steps, not 28"):
        published("magcache", pipe, 28, file)
    known["teacache"][0]["model"] = wan["model"]
    file.write_text(yaml.safe_dump(known))
    assert published("teacache", pipe, 50, file)["coefficients"][-1] == 0.137887774
    with pytest.raises(erta.ErtaError, match="of teacache for Wan2.1-T2V-1.3B are for 50 steps, not 30"):
        published("teacache", pipe, 30, file)
