"""Runs in its own process: `python vbench_worker.py REQUEST.json ANSWER.json`. Needs vbench and nothing of ours."""

import json
import os
import sys
from pathlib import Path


def main(request_path: str, answer_path: str) -> None:
    """Evaluate every dimension of the request in custom_input mode and write scores per video."""
    request = json.loads(Path(request_path).read_text())
    import torch
    import vbench

    info = os.path.join(os.path.dirname(vbench.__file__), "VBench_full_info.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = vbench.VBench(device, info, request["scratch"])
    answer = {}
    for dimension in request["dimensions"]:
        bench.evaluate(
            videos_path=request["folder"],
            name=dimension,
            prompt_list=request["prompts"],
            dimension_list=[dimension],
            mode="custom_input",
        )
        results = json.loads(Path(request["scratch"], f"{dimension}_eval_results.json").read_text())
        score, videos = results[dimension]
        per_video = {Path(video["video_path"]).name: float(video["video_results"]) for video in videos}
        absent = sorted(set(request["prompts"]) - set(per_video))
        if absent:
            raise SystemExit(f"{dimension}: no score for {', '.join(absent[:3])}")
        answer[dimension] = {"score": float(score), "per_video": per_video}
    Path(answer_path).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
