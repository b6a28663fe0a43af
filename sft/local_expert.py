"""An expert that is a checkpoint on this machine: `sample` asks it, nothing leaves the house and nothing is paid.

    python -m sft.annotate --expert local:Qwen/Qwen2.5-VL-7B-Instruct …

Its answers are kept like an endpoint's (sft/experts.py), as they come: who starts again goes on behind the last one."""
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from grpo.engine.encode import Encoder
from grpo.engine.rollout import Sampling, sample
from grpo.runtime.fsdp import compute_dtype
from grpo.runtime.log import progress, say
from grpo.runtime.run import load_frozen
from sft.experts import answered_before, cost_line, request_digest
from sft.filters import Request

OPTIONS = {"max_tokens": 2048, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0}  # and their defaults
AT_ONCE = 32  # requests whose prompts are in memory together; after each of these their answers are on disk


def check_options(options: dict) -> dict:
    """The expert's options with the defaults of those not given."""
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError(f"--expert_options: no option {name!r} of a local expert; it has {', '.join(OPTIONS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"--expert_options: {name} is {value!r}; a number expected")
    return {**OPTIONS, **options}


def ask_all(model: str, requests: list[Request], path: Path, *, options: dict, template: str = "",
            max_pixels: int = 1280 * 28 * 28) -> dict[str, str]:
    """Response by request id, old ones from `path` and new ones, which are appended to it."""
    options = check_options(options)
    asked, new = request_digest(model, options, template), {}
    answers, missing = answered_before(path, requests, asked)
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        for request, answer in answers_of(model, missing, options, max_pixels):
            new[request.id] = answer
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"id": request.id, **answer, "request": asked}) + "\n")
        say(f"{model}: {cost_line(new)} in this run, {cost_line({**answers, **new})} in all")
    return {name: answer["response"] for name, answer in {**answers, **new}.items()}


def answers_of(model: str, requests: list[Request], options: dict, max_pixels: int) -> Iterator[tuple[Request, dict]]:
    """(request, its answer) of every request, some at a time."""
    device, encoder = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Encoder(model, max_pixels)
    policy = load_frozen(model, "", compute_dtype("auto", device), device)
    sampling = Sampling(int(options["max_tokens"]), encoder.end_tokens, options["temperature"], options["top_p"],
                        int(options["top_k"]), rows=AT_ONCE, seed=f"{options['seed']}/expert")
    with progress(len(requests), "expert", "response") as bar:
        for begin in range(0, len(requests), AT_ONCE):
            some = requests[begin : begin + AT_ONCE]
            prompts = [encoder.encode(*one.prompt(), id=one.id) for one in some]
            groups = sample(policy, prompts, 1, sampling, lambda written, ended, spared: bar.update(ended))
            for one, group in zip(some, groups):
                yield one, {"response": encoder.decode(group.completions[0]), "tokens_in": len(group.prompt),
                            "tokens_out": len(group.completions[0])}
