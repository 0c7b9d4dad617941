"""Rows of a table: a method with options at a budget. Each one can be run alone, by `python run.py` with its overrides."""

from __future__ import annotations

from dataclasses import dataclass

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from analysis import records
from experiments.harness import catalogue, config

NO_CORRECTOR = "cache.corrector_at_reused=false"


@dataclass(frozen=True)
class Row:
    """What is typed after `python run.py` for a row, and what it is called.

    Rows are compared with the reference row of their own group: same `block`, or without one same `computed`, same `site` if
    that is named.

    Attributes:
        label: names the row in its group.
        method: of `conf/cache`.
        options: further overrides.
        computed: number of computed steps; None: the method knows no budget, or is given a threshold.
        title: for people; by default the label.
        block: a part of the table within which rows are compared, whatever their budgets.
        paper: the numbers that are printed for the row, by metric.
        why_not: why the row is not sampled; its method does not matter then.
        searches: the method whose search it uses, if that is another: such rows are sampled in one process.
    """

    label: str
    method: str
    options: tuple[str, ...] = ()
    computed: int | None = None
    site: str | None = None
    title: str | None = None
    searches: str | None = None
    block: str | None = None
    paper: tuple[tuple[str, float], ...] = ()
    why_not: str | None = None

    @property
    def key(self) -> str:
        """Label and group, which name the row in its table."""
        named = (self.site, self.computed) if self.block is None else (self.block,)
        where = ", ".join(str(part) for part in named if part is not None)
        return self.label + (f" ({where})" if where else "")

    @property
    def overrides(self) -> tuple[str, ...]:
        """What the row sets."""
        site = () if self.site is None else (f"cache.site={self.site}",)
        budget = () if self.computed is None else (f"cache.steps={self.computed}",)
        return (f"cache={self.method}", *self.options, *site, *budget)

    def record(self) -> records.Row:
        """The row as it is kept."""
        return records.Row(
            key=self.key,
            label=self.label,
            title=self.title or self.label,
            method=self.method,
            group="none" if self.why_not else catalogue.facts(self.method).group,
            computed=self.computed,
            site=self.site,
            block=self.block,
            paper=dict(self.paper),
            overrides=[] if self.why_not else list(self.overrides),
        )


def compose_row(row: Row) -> DictConfig:
    """The configuration of this run with a row's overrides."""
    cfg = compose("config", overrides=[*HydraConfig.get().overrides.task, *row.overrides])
    config.validate(cfg)
    return cfg
