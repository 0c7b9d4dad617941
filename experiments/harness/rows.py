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

    Rows are compared with the reference row of their own group: same `computed`, same `site` if that is named.

    Attributes:
        label: names the row in its group.
        method: of `conf/cache`.
        options: further overrides.
        computed: number of computed steps; None: the method knows no budget.
        title: for people; by default the label.
        searches: the method whose search it uses, if that is another: such rows are sampled in one process.
    """

    label: str
    method: str
    options: tuple[str, ...] = ()
    computed: int | None = None
    site: str | None = None
    title: str | None = None
    searches: str | None = None

    @property
    def key(self) -> str:
        """Label and group, which name the row in its table."""
        where = ", ".join(str(part) for part in (self.site, self.computed) if part is not None)
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
            group=catalogue.facts(self.method).group,
            computed=self.computed,
            site=self.site,
            overrides=list(self.overrides),
        )


def compose_row(row: Row) -> DictConfig:
    """The configuration of this run with a row's overrides."""
    cfg = compose("config", overrides=[*HydraConfig.get().overrides.task, *row.overrides])
    config.validate(cfg)
    return cfg
