"""Records of earlier versions, brought to today's form when they are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

SCHEMA = "erta.record/1"
NAMES = ("speed.json", "model_card.json", "calibration.json")  # each kind had a file name of its own
SETUPS = "arms.jsonl"
UNKNOWN: dict[str, Any] = {
    "command": "not recorded",
    "git_commit": None,
    "versions": {},
    "device": "not recorded",
    "config_hash": "",
}
MADE = ("command", "git_commit", "versions", "device", "config", "config_hash")
_KEY = re.compile(r"(?P<label>.*?)(?: \((?:(?P<site>\w+), )?(?P<computed>\d+)\))?")


def record(data: Any, where: Path) -> Any:
    """A record in today's form; one that is today's comes back as it is."""
    if not isinstance(data, dict):
        return data
    if data.get("schema") == "erta.record/2":
        return {**data, "table": _table(data["table"])} if isinstance(data.get("table"), dict) else data
    made = {key: data[key] for key in MADE if key in data}
    if "metrics" in data:
        return _main(data)
    if "table" in data or "tables" in data:
        return _rows(data, made)
    if "propagation_gain" in data:
        return _decomposition(data, made)
    if "planned" in data:
        return {
            **UNKNOWN,
            "config": {},
            "kind": "calibration",
            "calibration": data["record"],
            "planned": data["planned"],
        }
    if "untrained" in data:
        uncached, cached = data["forwards"]
        rest = {key: value for key, value in data.items() if key not in ("schema", "seeds", "prompts", "untrained")}
        return {
            **rest,
            "kind": "speed",
            "pairs": len(data["seeds"]),
            "forwards_uncached": uncached,
            "forwards": cached,
        }
    if "flops_per_forward" in data:
        return {**UNKNOWN, "config": {}, **data, "kind": "model_card"}
    return data


def lines(data: dict[str, Any]) -> dict[str, Any]:
    """Samples and setups of a table in today's form."""
    last: dict[str, float] = {}
    samples = []
    for line in data["samples"]:
        sample = {"uncached_s": None, "lpips": None, "cache_bytes": 0, **line}
        if "last_step" in sample:
            last[sample["row"]] = sample.pop("last_step")
        if isinstance(sample["scene"], bool):
            sample["scene"] = {"all": sample["scene"]}
        samples.append(sample)
    known = {line["row"]: {"last_sigma": last.get(line["row"]), **line} for line in data["setups"]}
    for key in last:
        known.setdefault(
            key, {"row": key, "calibration_s": 0.0, "last_sigma": last[key], "ran_on": "not recorded", "commit": None}
        )
    return {"samples": samples, "setups": list(known.values())}


def _main(data: dict[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in data.items() if key != "schema"}
    return {"plan_report": {}, **made, "kind": "main"}


def _rows(data: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Rows had keys alone, which held label, site and budget."""
    if "tables" in data:
        first: dict[str, Any] = next(iter(data["tables"].values()), {"rows": []})
        noise_floor = [f"{line[0].split(':')[0]}" for line in first["rows"] if "uncached again" in line[0]]
        points = [f"{one['method']} ({one['computed']})" for one in data["points"] if one["computed"] is not None]
        keys = [*noise_floor, *points, *(key for key in data["not_run"] if key not in points)]
        columns = ["forwards", "speedup", "psnr_db", "gain", "ssim", "lpips", "scene", "cache_bytes", "calibration_s"]
        table: dict[str, Any] = {
            "reference": "ertacache",
            "columns": columns,
            "best_first": True,
            "figures": ["methods"],
        }
    else:
        keys = [line[0] for line in data["table"]["rows"] if line[0] != "uncached"]
        columns = ["forwards", "psnr_db_std", "gain", "ssim", "scene", "last_sigma"]
        table = {"reference": "policy", "columns": columns}
    config = data["config"]
    noises = config["experiment"].get("seeds", 1) if "table" in data else 1
    return {
        **made,
        "kind": "rows",
        "experiment": "compare" if "tables" in data else "table",
        "prompts": data["prompts"],
        "seeds": data["seeds"],
        "num_steps": config["model"]["num_inference_steps"],
        "noises": noises,
        "rows": [_row(key) for key in keys],
        "table": table,
        "uncached_scene": [None] * len(data["prompts"]),
    }


def _table(table: dict[str, Any]) -> dict[str, Any]:
    """How a table is shown: its figures had no names, and its claims were lists."""
    made = {"figures": ["methods"] if table.get("has_figures") else [], **table}
    claims = [
        one if isinstance(one, dict) else dict(zip(("text", "better", "worse"), one, strict=True))
        for one in table.get("claims", ())
    ]
    return {**made, "claims": claims}


def _row(key: str) -> dict[str, Any]:
    found = _KEY.fullmatch(key)
    assert found is not None  # it matches everything
    computed = found["computed"]
    return {
        "key": key,
        "label": found["label"],
        "title": found["label"],
        "method": found["label"],
        "group": "planned",
        "computed": None if computed is None else int(computed),
        "site": found["site"],
    }


def _decomposition(data: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    return {
        **made,
        "kind": "decomposition",
        "prompts": data["prompts"],
        "seeds": data["seeds"],
        "shares": data["shares"],
        "by_step": {},
        "open_loop_over_total": data["open_loop_over_total"],
        "growth": {step: [value] for step, value in data["propagation_gain"].items()},
    }
