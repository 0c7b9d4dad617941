"""Runs in its own process: `python vbench_worker.py REQUEST.json ANSWER.json`. Needs vbench and nothing of ours."""

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

INFO = "VBench_full_info.json"
IN_PERCENT = "imaging_quality"  # its videos' scores are 100 times the dimension's
MAY_LEAVE_OUT = "color"  # scores only the videos in which it finds the object


def locate() -> dict:
    """Where the package's list of prompts lies; None if this interpreter has no vbench. Imports nothing."""
    spec = importlib.util.find_spec("vbench")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [os.path.join(folder, INFO) for folder in folders]
    return {"info": next((file for file in files if os.path.isfile(file)), None), "python": sys.executable}


def try_imports(dimensions: list) -> dict:
    """For each dimension whose code cannot be imported here, why."""
    failed = {}
    for name in dimensions:
        try:
            importlib.import_module(f"vbench.{name}")
        except ModuleNotFoundError as error:
            failed[name] = f"Python module not found: {error.name}"
        except Exception as error:  # an incompatible version of numpy or transformers can raise anything
            lines = str(error).strip().splitlines()
            failed[name] = f"cannot be imported: {type(error).__name__}: {lines[0] if lines else ''}"
    return failed


def unreadable(paths: list) -> list:
    """Those of the videos that OpenCV, with which VBench reads, gets no frame from."""
    import cv2

    found = []
    for path in paths:
        capture = cv2.VideoCapture(path)
        if not capture.read()[0]:
            found.append(path)
        capture.release()
    return found


def score(request: dict) -> dict:
    """One dimension on the videos of both arms: {arm: {"score", "per_video"}}, or {"unreadable": paths}."""
    import torch
    import vbench

    dimension, names = request["dimension"], request["names"]
    found = unreadable([os.path.join(folder, name) for folder in request["arms"].values() for name in names])
    if found:
        return {"unreadable": found}
    if dimension == "subject_consistency":
        _offer_dino(Path(request["scratch"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    answer = {}
    for arm, folder in request["arms"].items():
        bench = _listing(vbench.VBench, request["entries"] or [])(device, locate()["info"], request["scratch"])
        own_prompts = {} if request["entries"] else {"prompt_list": request["prompts"], "mode": "custom_input"}
        try:
            bench.evaluate(videos_path=folder, name=arm, dimension_list=[dimension], local=True, **own_prompts)
        except ZeroDivisionError:
            raise SystemExit(f"{dimension}: VBench found in no {arm} video what it is to score") from None
        results = json.loads(Path(request["scratch"], f"{arm}_eval_results.json").read_text())
        value, videos = results[dimension]
        unit = 100 if dimension == IN_PERCENT else 1
        per_video = {os.path.basename(video["video_path"]): float(video["video_results"]) / unit for video in videos}
        absent = sorted(set(names) - set(per_video))
        if absent and dimension != MAY_LEAVE_OUT:
            raise SystemExit(f"{dimension}: VBench gave no score for {', '.join(absent[:3])}")
        answer[arm] = {"score": float(value), "per_video": per_video}
    return answer


def _listing(base: type, entries: list) -> type:
    """VBench with the videos of each prompt as the request lists them.

    The package looks for five of each by name; so any number can be scored, and prompts too long for a file name.
    """
    if not entries:
        return base

    class Listed(base):  # type: ignore[misc, valid-type]
        def build_full_info_json(self, videos_path, name, *args, **kwargs):  # type: ignore[no-untyped-def]
            path = os.path.join(self.output_path, f"{name}_full_info.json")
            listed = [
                {**entry, "video_list": [os.path.join(videos_path, video) for video in entry["videos"]]}
                for entry in entries
            ]
            Path(path).write_text(json.dumps(listed))
            return path

    return Listed


def _offer_dino(scratch: Path) -> None:
    """Show DINO's weights to its hub code, which looks for them in torch's cache and not where VBench keeps them."""
    import torch
    from vbench.utils import CACHE_DIR

    name = "dino_vitbase16_pretrain.pth"
    torch.hub.set_dir(str(scratch / "hub"))
    checkpoints = scratch / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    if not (checkpoints / name).exists():
        (checkpoints / name).symlink_to(os.path.abspath(os.path.join(CACHE_DIR, "dino_model", name)))


def main(request_path: str, answer_path: str) -> None:
    """Answer one request: locate, imports or score."""
    request = json.loads(Path(request_path).read_text())
    if request["task"] == "locate":
        answer = locate()
    elif request["task"] == "imports":
        answer = try_imports(request["dimensions"])
    else:
        answer = score(request)
    Path(answer_path).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
