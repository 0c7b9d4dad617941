"""Every key of the configuration with every kind of bad value, and what comes back: good, weak or bad.

    python -m tests.bad_inputs outputs/bad_inputs.md

`good`: refused before anything is loaded, in one or two lines that name the key. `weak`: refused, but without the key, or at length.
`bad`: taken as if it meant something.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from experiments import cli
from experiments.harness import catalogue, config
from experiments.harness.config import CONF

NUMBERS = {
    "NaN": "nan", "infinite": "inf", "negative": "-1", "far too large": "1000000000000", "2^70": str(2**70), "a text": "abc",
    "an empty text": "", "a list": "[1,2]", "an object": "{a:1}", "true": "true",
}  # fmt: skip
FRACTION = {"a fraction": "1.5"}
ZERO = {"zero": "0"}
TEXTS = {
    "an empty text": "",
    "blanks": "'  '",
    "a list": "[a,b]",
    "an object": "{a:1}",
    "control characters": "'a\x07b'",
}
WORDS = {**TEXTS, "an unknown word": "sideways"}
FLAGS = {"a number": "3", "a word": "perhaps", "an empty text": "", "a list": "[true]", "null": "null"}
LISTS = {"a number": "3", "an object": "{a:1}", "null": "null", "an empty entry": "['']", "an object inside": "[{a:1}]"}
NUMBER_LISTS = {
    "a number": "3", "a text": "abc", "NaN inside": "[nan]", "negative inside": "[-1]", "a text inside": "[abc]",
    "infinite inside": "[inf]", "null": "null",
}  # fmt: skip
MAY_BE_ZERO = {
    "seed", "model.guidance_scale", "model.guidance_scale_2", "model.paper_threshold", "cache.threshold",
    "compare.worst", "solver_limits.worst", "solver_limits.refine",
}  # fmt: skip
WORD_KEYS = {
    "model.dtype", "model.offload", "model.prompt_source", "model.world", "cache.site", "cache.rectifier_fit", "cache.policy",
    "cache.rel_l1_denominator", "cache.phi_denominator", "cache.time_form", "cache.rectifier", "cache.rectifier_form",
    "cache.reuse", "bench.frames_from", "bench.suite", "wandb.mode", "cache.about.group", "compare.reference",
    "sampler.scheduler", "regimes.dial",
}  # fmt: skip
LEFT_OUT = (
    "experiment.",
    "_target_",
    ".about.",
    ".name",
)  # chosen with their group: setting them is refused at once, or says nothing
SKIPPED = {"sampler.options", "cache.options", "bench.dimensions", "resume"}  # of any type: below
ANY = {
    "resume": {"an unknown word": "perhaps", "a number": "3", "null": "null", "a list": "[true]"},
    "bench.dimensions": {"an unknown word": "beauty", "a number": "3", "null": "null", "a list of numbers": "[1,2]"},
}


@dataclass(frozen=True)
class Answer:
    """What came back for one override."""

    override: str
    kind: str
    verdict: str
    said: str


def cases() -> Iterator[tuple[str, str, list[str]]]:
    """Kind, override, and the other overrides that it needs."""
    owners = {name: [f"experiment={name}"] for name in experiments_with_keys()}
    for key in config.all_keys():
        group = key.split(".")[0]
        if key in SKIPPED or key in config.SCHEMA or key in owners or any(part in key for part in LEFT_OUT):
            continue
        rest = owners.get(group, [])
        for kind, value in kinds_of(key, typed(key, rest)).items():
            yield kind, f"{key}={value}", rest
    for key, kinds in ANY.items():
        for kind, value in kinds.items():
            yield kind, f"{key}={value}", []
    for method in catalogue.names():
        for option, usual in catalogue.configuration(method).options.items():
            for kind, value in option_kinds(str(option), usual).items():
                yield kind, f"cache.options.{option}={value}", [f"cache={method}"]


def experiments_with_keys() -> list[str]:
    return sorted(
        path.stem for path in (CONF / "experiment").glob("*.yaml") if f"/keys@{path.stem}:" in path.read_text()
    )


def typed(key: str, rest: list[str]) -> Any:
    """The type that the schema gives a key: its name, as Hydra's node says."""
    cfg = composed(rest)
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    assert isinstance(node, DictConfig)
    return node._get_node(name)


def kinds_of(key: str, node: Any) -> dict[str, str]:
    """Which bad values there are for a key, by the kind of its node."""
    of = type(node).__name__
    if of == "BooleanNode":
        return FLAGS
    if key == "seed":  # 10^12 is one
        return {kind: value for kind, value in {**NUMBERS, **FRACTION}.items() if kind != "far too large"}
    if of in ("IntegerNode", "FloatNode"):
        zero = {} if key in MAY_BE_ZERO or key.endswith(".timed") else ZERO
        return {**NUMBERS, **zero, **(FRACTION if of == "IntegerNode" else {})}
    if of == "StringNode":
        return WORDS if key in WORD_KEYS else TEXTS
    if of == "ListConfig":
        is_number = node._metadata.element_type in (int, float)
        return NUMBER_LISTS if is_number else LISTS
    return {}


def option_kinds(option: str, usual: Any) -> dict[str, str]:
    if isinstance(usual, bool):
        return {key: value for key, value in FLAGS.items() if key != "null"}
    if isinstance(usual, str) or option == "sampler":
        return {**TEXTS, **({} if option in ("of", "sampler") else {"an unknown word": "sideways"})}
    if OmegaConf.is_list(usual):
        return {"a number": "3", "a text": "abc", "NaN inside": "[nan]", "negative inside": "[-1]"}
    return {key: value for key, value in NUMBERS.items() if value != "2^70"}


_COMPOSED: dict[tuple[str, ...], DictConfig] = {}


def composed(overrides: list[str]) -> DictConfig:
    if tuple(overrides) not in _COMPOSED:
        _COMPOSED[tuple(overrides)] = compose("config", overrides=overrides)
    return _COMPOSED[tuple(overrides)]


def ask(kind: str, override: str, rest: list[str]) -> Answer:
    """What the command line says to one override."""
    overrides = [*rest, override]
    try:
        parsed = OverridesParser.create().parse_override(override)
        cfg = copy.deepcopy(composed(rest))
        OmegaConf.update(
            cfg, parsed.key_or_group, parsed.value(), merge=False
        )  # as Hydra does, without its second of composing
        config.check_is_read(cfg, overrides)
        config.validate(cfg)
    except Exception as error:
        said = cli._explain(error)
        key = override.split("=")[0]
        names_key = key in said or key.split(".")[-1] in said
        is_raw = said.startswith(("ValueError:", "TypeError:", "AttributeError:", "KeyError:")) or "Traceback" in said
        good = names_key and not is_raw and len(said.splitlines()) <= 3 and len(said) < 700
        return Answer(override, kind, "good" if good else "weak", " ".join(said.split()))
    return Answer(override, kind, "bad", "accepted")


def answers(every: int = 1) -> list[Answer]:
    """All of them, or every n-th."""
    GlobalHydra.instance().clear()
    config.register()
    _COMPOSED.clear()
    with initialize_config_dir(str(CONF), version_base=None):
        return [ask(*case) for case in list(cases())[::every]]


def table(found: list[Answer]) -> str:
    """All answers as Markdown, counted first."""
    counts = Counter(one.verdict for one in found)
    head = ", ".join(f"{name} {counts[name]}" for name in ("good", "weak", "bad"))
    rows = [f"| `{one.override}` | {one.kind} | {one.verdict} | {one.said.replace('|', '/')[:160]} |" for one in found]
    return "\n".join(
        [f"# Bad inputs: {head}", "", "| input | kind | verdict | answer |", "|---|---|---|---|", *rows, ""]
    )


def main() -> int:
    """Write the table; 1 if anything bad was taken."""
    found = answers()
    counts = Counter(one.verdict for one in found)
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/bad_inputs.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table(found), encoding="utf-8")
    for one in found:
        if one.verdict != "good":
            print(f"{one.verdict}: {one.override} ({one.kind}): {one.said[:150]}")
    print(f"{len(found)} inputs: {dict(counts)}; written: {path}")
    return int(counts["bad"] > 0)


if __name__ == "__main__":
    sys.exit(main())
