"""Load the pipeline that a config names: embedded, from a local folder, or from the hub."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open

import erta
from erta.errors import ErtaError
from erta.pipeline import find_denoisers
from experiments.models.classes import class_named
from experiments.scenes.attributes import WORLDS
from experiments.scenes.captions import vocabulary, words_of

ASSETS = Path(erta.__file__).parent / "assets"


def load_pipeline(cfg: DictConfig) -> Any:
    """The pipeline of `cfg.model` with the solver of `cfg.sampler`, on the GPU if there is one.

    `model.offload` counts only there. Raises ErtaError with what was looked for, and what to do, if the weights are
    missing or damaged, and for tiles, a compilation, true guidance or a world that this model does not know.
    """
    model = cfg.model
    folder, pipeline_class = _local_folder(model), class_named(model.pipeline)
    check_true_guidance(pipeline_class, model)
    if folder is not None:
        check_folder(folder)
    try:
        pipe = pipeline_class.from_pretrained(
            str(folder) if folder is not None else model.hub_id,
            torch_dtype=getattr(torch, model.dtype),
            local_files_only=folder is not None,
            **({"revision": model.revision} if folder is None and model.revision is not None else {}),
        )
    except ErtaError:
        raise  # says what is wrong itself
    except (OSError, ValueError, SafetensorError) as error:
        if folder is not None:
            raise ErtaError(f"{folder} does not load as a {model.pipeline}: {_first_line(error)}") from error
        where = getattr(pipeline_class, "where_weights_are", None)
        raise ErtaError(_missing_weights(model, where() if where is not None else None)) from error
    if model.guidance_scale_2 is not None and getattr(pipe, "transformer_2", None) is None:
        raise ErtaError(f"model.guidance_scale_2 is for pipelines with two transformers, and {model.name} has one")
    if model.embedded:
        check_world(pipe, model)
    set_sampler(pipe, cfg)
    pipe.set_progress_bar_config(disable=True)
    _tile(pipe, model)
    compile_blocks(pipe, model)
    return place(pipe, model)


def place(pipe: Any, model: DictConfig) -> Any:
    """The pipeline on the GPU if there is one, whole or as `model.offload` says."""
    if not torch.cuda.is_available():
        return pipe
    if model.offload == "none":
        return pipe.to("cuda")
    if model.offload == "model":
        pipe.enable_model_cpu_offload(gpu_id=torch.cuda.current_device())
    else:
        pipe.enable_sequential_cpu_offload(gpu_id=torch.cuda.current_device())
    return pipe


def _tile(pipe: Any, model: DictConfig) -> None:
    if model.vae_tiling:
        try:
            pipe.vae.enable_tiling()
        except (AttributeError, NotImplementedError) as error:
            vae = type(getattr(pipe, "vae", None)).__name__
            raise ErtaError(f"model.vae_tiling=true: {vae} of {model.name} cannot decode in tiles") from error


def compile_blocks(pipe: Any, model: DictConfig) -> None:
    """With `model.compile`, have the repeated blocks of every transformer compiled when they first run.

    Raises ErtaError for a transformer that does not name them.
    """
    if not model.compile:
        return
    for transformer in find_denoisers(pipe).values():
        if not getattr(transformer, "_repeated_blocks", None):
            raise ErtaError(
                f"model.compile=true: {type(transformer).__name__} does not say which of its blocks are repeated"
            )
        transformer.compile_repeated_blocks()


@contextmanager
def memory_advice(cfg: DictConfig) -> Iterator[None]:
    """Inside, running out of GPU memory raises ErtaError with the options that lower what `cfg.model` needs."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ErtaError(_out_of_memory(cfg.model)) from error


def _out_of_memory(model: DictConfig) -> str:
    size = f"{model.height}x{model.width}" + (f" with {model.num_frames} frames" if model.num_frames else "")
    options = {"none": ["model.offload=model"], "model": ["model.offload=sequential (slow)"]}.get(model.offload, [])
    options += ["model.vae_tiling=true"] if not model.vae_tiling else []
    options += ["model.dtype=bfloat16"] if model.dtype == "float32" else []
    options += [f"fewer than model.num_frames={model.num_frames}"] if model.num_frames else []
    options += [f"a size below model.height={model.height} model.width={model.width}"]
    return (
        f"out of GPU memory: {model.name} at {size}. It needs less with {', '.join(options)}.\n"
        "What was finished is kept, and the same command goes on from there; with other options a new run starts."
    )


def set_sampler(pipe: Any, cfg: DictConfig) -> None:
    """Put the solver of `cfg.sampler` on the pipeline, or set the model's shift on its own solver.

    Without a fixed shift the pipeline must give one by image size (FLUX), which the solver then takes from it. Raises
    ErtaError if it does not.
    """
    sampler, own = cfg.sampler, pipe.scheduler.config
    if sampler.scheduler is not None and cfg.model.flow_shift is None and not own.get("use_dynamic_shifting"):
        raise ErtaError(
            f"sampler={sampler.name}: it is not known how model={cfg.model.name} shifts its steps (it has no "
            "model.flow_shift, and no shift by image size as FLUX); keep sampler=default"
        )
    if sampler.scheduler is None:
        if cfg.model.flow_shift is not None and "flow_shift" in pipe.scheduler.config:
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=cfg.model.flow_shift)
        return
    options: Any = OmegaConf.to_container(sampler.options, resolve=True)
    scheduler = getattr(diffusers, sampler.scheduler)
    if cfg.model.flow_shift is not None:
        pipe.scheduler = scheduler(**options)
    else:
        options = {key: value for key, value in options.items() if value is not None}
        # use_flow_sigmas may be left of another solver: by it FluxPipeline would not give Euler its grid
        whole = {**own, "use_flow_sigmas": False, **options, "use_dynamic_shifting": True}
        pipe.scheduler = scheduler.from_config(whole)


def check_vocabulary(pipe: Any, prompts: list[str]) -> None:
    """Raise ErtaError for a word that the embedded model has never seen."""
    known = set(pipe.tokenizer.get_vocab())
    for prompt in prompts:
        unknown = [word for word in words_of(prompt) if word not in known]
        if unknown or not words_of(prompt):
            what = f"the words {', '.join(map(repr, unknown))} are" if unknown else "an empty prompt is"
            words = " ".join(sorted(word for word in known if word.isalpha()))
            raise ErtaError(f"{prompt!r}: {what} not in the embedded model's vocabulary.\nIt knows: {words}")


def world_of(tokenizer: Any) -> str | None:
    """The scene world whose words a tokenizer knows, neither more nor less; None if there is none."""
    words = {word for word in tokenizer.get_vocab() if word.isalpha()}
    return next((world for world in WORLDS if words == set(vocabulary(world))), None)


def check_world(pipe: Any, model: DictConfig) -> None:
    """Raise ErtaError if scenes of a world are asked of an embedded model that was trained on another."""
    known = world_of(pipe.tokenizer)
    if model.prompt_source == "scenes" and known is not None and known != model.world:
        raise ErtaError(
            f"model.world={model.world}: these weights were trained on the {known} world. Use model.world={known}, or name "
            f"other weights in model.path (experiment=train_tiny model.world={model.world} train_tiny.install=false makes some)"
        )


def check_true_guidance(pipeline_class: type, model: DictConfig) -> None:
    """Raise ErtaError for `model.true_cfg_scale` on a pipeline that does not know it."""
    known = inspect.signature(pipeline_class.__call__).parameters
    if model.true_cfg_scale is not None and "true_cfg_scale" not in known:
        raise ErtaError(
            f"model.true_cfg_scale: {pipeline_class.__name__} knows no true guidance, use model.guidance_scale"
        )


def check_folder(folder: Path) -> None:
    """Raise ErtaError if a pipeline folder is missing or has a missing, truncated or LFS-pointer weight file."""
    if not (folder / "model_index.json").is_file():
        raise ErtaError(f"{folder} is not a pipeline folder: it has no model_index.json")
    for part in sorted(path for path in folder.iterdir() if (path / "config.json").is_file()):
        files = sorted(part.glob("*.safetensors"))
        if not files and not list(part.glob("*.bin")) and part.name != "scheduler":
            raise ErtaError(f"{part} has no weights: no *.safetensors there. Copy the folder again.")
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    opened.keys()
            except (SafetensorError, OSError) as error:
                raise ErtaError(
                    f"{file} is damaged or truncated ({_first_line(error)}). Copy the folder again."
                ) from error


def _local_folder(model: DictConfig) -> Path | None:
    if model.path is not None:
        folder = Path(model.path).expanduser()
        if not folder.is_dir():
            raise ErtaError(f"model.path={model.path} is not a folder")
        return folder
    if model.embedded and not (ASSETS / model.name).is_dir():
        raise ErtaError(
            f"model={model.name} ships without weights: `python run.py experiment=train_tiny model={model.name}` makes "
            "them (hours on two cores)"
        )
    return ASSETS / model.name if model.embedded else None


def _missing_weights(model: DictConfig, where: str | None = None) -> str:
    """What was looked for, and what to do; `where`: a pipeline's own word on that."""
    from huggingface_hub.constants import HF_HUB_CACHE

    pinned = f" --revision {model.revision}" if model.revision is not None else ""
    other = ", or take what is in the cache (model.revision=null)" if pinned else ""
    how = where or (
        f"Download them with `hf download {model.hub_id}{pinned} --local-dir {model.name}` and add model.path={model.name}{other}"
    )
    return (
        f"no weights for model={model.name}: {model.hub_id}{f' at {model.revision[:7]}' if pinned else ''} is neither in "
        f"{HF_HUB_CACHE} nor reachable on the hub.\n{how}, or try the embedded model: python run.py model=wan21_tiny"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
