"""A run set up once: its configuration, its pipeline, and what both lead to. This one object is passed on to all."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

from omegaconf import DictConfig, OmegaConf

import erta
from erta.architectures import architecture_of
from erta.guidance import second_scale_of, true_scale_of
from erta.pipeline import find_denoiser, find_denoisers, single_denoiser
from erta.policy import steps_for_speedup
from erta.signature import model_signature
from experiments.harness.config import DEFAULT_SPEEDUP, budget
from experiments.models.call import CallGrid, call_grid, call_kwargs
from experiments.models.costs import forward_costs, outside_blocks
from experiments.models.load import check_vocabulary, load_pipeline
from experiments.prompts.choose import calibration_prompts

CALIBRATED_BY = ("num_prompts", "prompts", "window", "path")  # of `calibration`


class Setup:
    """What a run, or a row of a table, works with. Everything is found out at first use, once, and shared by all rows.

    Attributes:
        cfg: the configuration; `with_cache` gives a row's.
        pipe: the pipeline of `cfg.model` with the solver of `cfg.sampler`.
    """

    def __init__(self, cfg: DictConfig, pipe: Any = None) -> None:
        self.cfg = cfg
        self._shared = _Shared(cfg, load_pipeline(cfg) if pipe is None else pipe)

    def with_cache(self, cfg: DictConfig) -> Setup:
        """The same run with another configuration of `cache` and of `calibration`: model, sampler, test prompts are the same."""
        other = copy.copy(self)
        other.cfg, other._shared = cfg, self._shared.calibrated_as(cfg)
        return other

    @property
    def pipe(self) -> Any:
        return self._shared.pipe

    @property
    def kwargs(self) -> dict[str, Any]:
        """The pipeline's arguments of one uncached generation, without prompt and seed; a copy."""
        return dict(self._shared.kwargs)

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options as plain data; a copy."""
        return OmegaConf.to_container(self.cfg.cache.options, resolve=True)  # type: ignore[return-value]

    @property
    def grid(self) -> CallGrid:
        """The nominal grid of an uncached generation."""
        return self._shared.grid

    @property
    def calibration_prompts(self) -> list[str]:
        """Raises ErtaError for a word that the embedded model has never seen."""
        return self._shared.calibration_prompts

    @property
    def size(self) -> list[int | None]:
        """Height, width and number of frames."""
        model = self.cfg.model
        return [model.height, model.width, model.num_frames]

    @property
    def signature(self) -> dict[str, Any]:
        """What can be known of a calibration's signature before a run, at `cache.site`."""
        return {**self._shared.signature, "site": self.cfg.cache.site}

    @property
    def costs(self) -> dict[str, float]:
        """Each layer's share of an uncached forward's FLOPs (see `forward_costs`). Not for two transformers."""
        single_denoiser(self.pipe)
        return self._shared.costs(0)

    @property
    def calibrations(self) -> dict[str, erta.Calibration]:
        """By site, those that were found or made so far (see `calibrations.get_calibration`)."""
        return self._shared.calibrations

    def reuse_share(self, stage: int = 0) -> float:
        """What part of a forward a step reused at `cache.site` runs: at `blocks` embeddings and head, at `output` nothing.

        Args:
            stage: which of a pipeline's two transformers runs first.
        """
        stack = architecture_of(find_denoiser(self.pipe)).blocks
        if self.cfg.cache.site != "blocks" or stack is None:  # the site itself says that the blocks are not known
            return 0.0
        return outside_blocks(stack, self._shared.costs(stage))

    def step_count(self, takeover: int | None = None) -> int:
        """The budget in computed steps. Raises BudgetError for a threshold.

        With two transformers, the second runs from step `takeover`, which is computed anyhow.
        """
        cache, chosen = self.cfg.cache, budget(self.cfg)
        if cache.threshold is None and "threshold" in chosen:  # the model's published one: not for this method
            chosen = {"speedup": DEFAULT_SPEEDUP}
        if "threshold" in chosen:
            raise erta.BudgetError(f"cache={cache.name} has no threshold: give cache.speedup or cache.steps")
        if "steps" in chosen:
            return int(chosen["steps"])
        return steps_for_speedup(self.cfg.model.num_inference_steps, chosen["speedup"], takeover)


class _Shared:
    """What all rows of a run have in common."""

    def __init__(self, cfg: DictConfig, pipe: Any) -> None:
        self.cfg, self.pipe, self.kwargs = cfg, pipe, call_kwargs(cfg)
        self.calibrations: dict[str, erta.Calibration] = {}
        self._costs: dict[int, dict[str, float]] = {}
        self._others = [self]

    def calibrated_as(self, cfg: DictConfig) -> _Shared:
        """The same, with the calibration prompts, window and file of another configuration."""
        wanted = [cfg.calibration[key] for key in CALIBRATED_BY]
        for one in self._others:
            if [one.cfg.calibration[key] for key in CALIBRATED_BY] == wanted:
                return one
        other = copy.copy(self)
        other.cfg, other.calibrations = cfg, {}
        other.__dict__.pop("calibration_prompts", None)
        self._others.append(other)  # a list that all of them share
        return other

    @cached_property
    def grid(self) -> CallGrid:
        return call_grid(self.pipe, self.kwargs)

    @cached_property
    def signature(self) -> dict[str, Any]:
        grid = self.grid
        second = {"guidance_scale_2": second_scale_of(self.kwargs), "takeover": grid.takeover}
        return {
            **model_signature(self.pipe),
            "sigmas": [float(s) for s in grid.sigmas],
            "guidance_scale": float(self.cfg.model.guidance_scale),
            **({} if (true := true_scale_of(self.kwargs)) is None else {"true_cfg_scale": true}),
            **({} if grid.takeover is None else second),
        }

    @cached_property
    def calibration_prompts(self) -> list[str]:
        prompts = calibration_prompts(self.cfg)
        if self.cfg.model.embedded:
            check_vocabulary(self.pipe, prompts)
        return prompts

    def costs(self, stage: int) -> dict[str, float]:
        if stage not in self._costs:
            found = find_denoisers(self.pipe)
            self._costs[stage] = forward_costs(self.pipe, self.kwargs, found.get(stage, find_denoiser(self.pipe)))
        return self._costs[stage]
