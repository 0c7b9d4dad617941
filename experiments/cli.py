"""The command line: composes the configuration, opens the run folder, turns errors into one or two lines."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import get_method
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from erta.errors import ErtaError
from experiments import config, console

CONF = Path(__file__).resolve().parents[1] / "conf"
GROUPS = ("model", "sampler", "cache", "bench", "experiment")
EXIT_ERROR, EXIT_INTERRUPTED = 1, 130


def main() -> None:
    """Entry point of run.py."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come through to `_explain`, which prints them short
    if "--traceback" in sys.argv:
        sys.argv.remove("--traceback")
        _hydra_main()
        return
    try:
        _hydra_main()
    except KeyboardInterrupt:
        _fail("interrupted. What was finished is kept: the same command goes on from there.", EXIT_INTERRUPTED)
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        _fail(_explain(error), EXIT_ERROR)


def register_help() -> None:
    """`--help` shows every choice of every group with its first line."""
    lines = ["python run.py [group=choice ...] [key=value ...]", ""]
    for group in GROUPS:
        lines.append(f"{group}:")
        for path in sorted((CONF / group).glob("*.yaml")):
            first = next(
                (line for line in path.read_text().splitlines() if line.startswith("# ") and "@" not in line), "#"
            )
            lines.append(f"  {path.stem:<18} {first[2:]}")
        lines.append("")
    lines += [
        "Keys you will want: model.num_inference_steps, model.guidance_scale, model.path, cache.threshold |",
        "cache.speedup | cache.steps (one of them), calibration.num_prompts, calibration.path, bench.num_prompts,",
        "bench.prompts, seed, resume, hydra.run.dir. --cfg job prints the configuration, -m runs a sweep,",
        "--traceback shows where an error came from.",
    ]
    help_node = {"app_name": "run.py", "header": "", "footer": "", "template": "\n".join(lines).replace("$", "$$")}
    ConfigStore.instance().store(group="hydra/help", name="erta", node=help_node)


config.register()
register_help()


@hydra.main(version_base=None, config_path=str(CONF), config_name="config")
def _hydra_main(cfg: DictConfig) -> None:
    from experiments.record import open_folder

    config.validate(cfg)
    fresh = Path(HydraConfig.get().runtime.output_dir)
    folder = open_folder(cfg, fresh)
    if folder != fresh:
        shutil.rmtree(fresh, ignore_errors=True)  # holds nothing but Hydra's copy of the same configuration
    get_method(cfg.experiment._target_)(cfg, folder)


def _explain(error: BaseException) -> str:
    if isinstance(error, ErtaError):
        return str(error)
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _first_lines(error, 2)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.filename or 'while writing'}). Free some space; the same command goes on."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"cannot write to {error.filename}: {error.strerror}. Choose another folder with hydra.run.dir=FOLDER."
    return f"{type(error).__name__}: {_first_lines(error, 1)} (add --traceback for where this came from)"


def _first_lines(error: BaseException, count: int) -> str:
    lines: list[Any] = [line for line in str(error).splitlines() if line.strip()]
    return "\n".join(lines[:count])


def _fail(message: str, code: int) -> None:
    console.out.print()
    print(f"error: {message}" if code == EXIT_ERROR else message, file=sys.stderr)
    raise SystemExit(code)
