"""A full GRPO step against TRL 1.16's GRPOTrainer: one rollout, reference log-probabilities, two updates.

    python -m benchmarks.update_vs_trl

Same weights, images and prompts, G = 8, two prompts of two images, completions forced to the same length, beta
0.001, float32, frozen vision encoder, no gradient checkpointing, each side in a process of its own, one after the
other. TRL generates with transformers, as it does without a vLLM server. Each side goes through one step of a small
model first, so that nothing is timed that happens once. Memory is the peak of the resident set beyond what the process
held before the step, less gradients and Adam's state; both sides hold policy and reference before it.

TRL needs torchvision for its processor. Beside a CPU build of torch, whose torchvision has no operators of its own, the
import is made to go through (`without_vision_operators`); no operator of torchvision is used.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import PeakMemory, append, without_vision_operators
from benchmarks.shapes import MODELS, write_model

G, PROMPTS, UPDATES, BETA, TEMPERATURE = 8, 2, 2, 0.001, 0.8
# name, shape, tokens of the prompt (two images included), pixels a side, tokens of a completion
CASES = {
    "big-head-200": ("big-head", 200, 224, 64),
    "big-head-800": ("big-head", 800, 448, 64),
    "trunk-800-64": ("trunk", 800, 448, 64),
    "trunk-800-256": ("trunk", 800, 448, 256),
    "small": ("small", 60, 112, 8),
}
TARGETS = {"big-head-200": 8, "big-head-800": 25, "trunk-800-64": 6, "trunk-800-256": 3.5}
TOKENS_PER_PASS = 4096
INSTALL = "TRL 1.16 is missing; install it beside torch and torchvision: pip install 'trl==1.16.0' torchvision"


def trained_bytes(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def hold(*models) -> None:
    """Read every weight: a loaded checkpoint is a mapped file, whose pages count only from their first use on."""
    for model in models:
        for parameter in model.parameters():
            parameter.detach().sum()


def count_images(visual, counter: list) -> None:
    """Every image that goes through the vision encoder adds one to counter[0]."""
    def hook(module, arguments, keywords):
        grids = keywords.get("grid_thw", arguments[1] if len(arguments) > 1 else None)
        counter[0] += len(grids)

    visual.register_forward_pre_hook(hook, with_kwargs=True)


# ── ours ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def our_trainer(folder: Path, case: str, speculate: str = "auto"):
    """The product's own trainer, and the samples of one rollout."""
    from benchmarks.shapes import whole_vocabulary, words_for
    from grpo.engine.encode import Encoder
    from grpo.runtime.run import Run
    from grpo.train import Settings, Trainer
    from grpo.variants import resolve

    whole_vocabulary()
    _, tokens, side, completion = CASES[case]
    text = words_for(Encoder(str(folder)), tokens, side)
    settings = Settings(
        model=str(folder),
        data=f"{side}/{text}",
        output=tempfile.mkdtemp(),
        task="benchmarks.two_images",
        valid_split="",
        max_completion_tokens=completion,
        prompts_per_rollout=PROMPTS,
        tokens_per_pass=TOKENS_PER_PASS,
        dtype="float32",
        learning_rate=1e-6,
        rollout_log_groups=0,
        speculate=speculate,
        objective=resolve("more-r1", beta=BETA, updates=UPDATES, group_size=G, temperature=TEMPERATURE),
    )
    run = Run(settings)
    run.encoder.end_tokens = ()  # nothing ends a completion but the limit
    return Trainer(run, settings), run.load("train")[:PROMPTS]


def our_step(folder: Path, case: str) -> dict:
    trainer, samples = our_trainer(folder, case)
    seen, memory = [0], PeakMemory()
    count_images(trainer.run.policy.visual, seen)
    hold(trainer.run.policy, trainer.reference)
    memory.start()
    line = trainer.step(samples, 0, [1e-6] * UPDATES)
    return {
        "generation": line["seconds/rollout"], "scoring": line["seconds/reference"], "update": line["seconds/update"],
        "total": line["step_time"], "extra_bytes": memory.beyond() - 3 * trained_bytes(trainer.run.policy),
        "images": seen[0], "prompt_tokens": len(trainer.run.prompts(samples[0])),
        "completion_tokens": line["completions/mean_length"],
    }


# ── TRL ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def trl_trainer(folder: Path, case: str):
    """GRPOTrainer around the same weights and prompts, under the settings that make it the same objective."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks.shapes import images as make_images, words_for
    from benchmarks.two_images import reward
    from grpo.engine.encode import Encoder

    _, tokens, side, completion = CASES[case]
    text = words_for(Encoder(str(folder)), tokens, side)
    images = json.loads((folder / "preprocessor_config.json").read_text())
    sizes = {"shortest_edge": images["min_pixels"], "longest_edge": images["max_pixels"]}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessorPil(size=sizes), tokenizer, Qwen2VLVideoProcessor(),
                                    chat_template=tokenizer.chat_template)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    rows = [
        {"prompt": [{"role": "user", "content": text}], "images": make_images(number, side)}
        for number in range(PROMPTS)
    ]
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=PROMPTS * G,
        gradient_accumulation_steps=1,
        num_generations=G,
        num_iterations=UPDATES,
        max_completion_length=completion,
        temperature=TEMPERATURE,
        top_p=1.0,
        beta=BETA,
        loss_type="grpo",
        use_bias_correction_kl=False,
        gradient_checkpointing=False,
        learning_rate=1e-6,
        max_steps=UPDATES,
        save_strategy="no",
        logging_strategy="no",
        shuffle_dataset=False,
        generation_kwargs={"min_new_tokens": completion},
    )
    luck = lambda completions, **_: [reward(turns[0]["content"], None)["luck"] for turns in completions]
    luck.__name__ = "luck"
    return GRPOTrainer(model, luck, args=arguments, processing_class=processor, train_dataset=Dataset.from_list(rows))


def timed(function, seconds: dict, phase: str, when=lambda: True):
    """`function`, its seconds added to `seconds[phase]` while `when()` holds."""
    def wrapper(*arguments, **keywords):
        counts, start = when(), time.perf_counter()
        result = function(*arguments, **keywords)
        if counts:
            seconds[phase] += time.perf_counter() - start
        return result

    return wrapper


def trl_step(folder: Path, case: str) -> dict:
    import torch

    trainer = trl_trainer(folder, case)
    seconds, seen, memory, lengths = {"generation": 0.0, "scoring": 0.0}, [0], PeakMemory(), {}
    count_images(trainer.model.model.visual, seen)
    count_images(trainer.ref_model.model.visual, seen)
    trainer._generate = timed(trainer._generate, seconds, "generation")
    trainer._get_per_token_logps_and_entropies = timed(
        trainer._get_per_token_logps_and_entropies, seconds, "scoring", lambda: not torch.is_grad_enabled())
    step, loss = trainer.training_step, trainer._compute_loss
    began = []

    def first_step(*arguments, **keywords):
        if not began:
            hold(trainer.model, trainer.ref_model)
            memory.start()
            began.append(time.perf_counter())
        return step(*arguments, **keywords)

    def measured_loss(model, inputs):
        lengths.update(prompt=inputs["prompt_mask"].sum(1).float().mean().item(),
                       completion=inputs["completion_mask"].sum(1).float().mean().item())
        return loss(model, inputs)

    trainer.training_step, trainer._compute_loss = first_step, measured_loss
    trainer.train()
    total = time.perf_counter() - began[0]
    return {
        **seconds, "update": total - sum(seconds.values()), "total": total,
        "extra_bytes": memory.beyond() - 3 * trained_bytes(trainer.model), "images": seen[0],
        "prompt_tokens": lengths["prompt"], "completion_tokens": lengths["completion"],
    }


# ── both ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(side: str, case: str, models: Path) -> dict:
    """One side in a process of its own, after a step of the small model."""
    words = [sys.executable, "-m", "benchmarks.update_vs_trl", "--side", side, "--cases", case, "--models", str(models)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        raise RuntimeError(f"{side}, {case}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def one_side(side: str, case: str, models: Path) -> None:
    without_vision_operators()
    step = {"ours": our_step, "trl": trl_step}[side]
    step(write_model(models / "small", "small"), "small")
    print(json.dumps(step(write_model(models / CASES[case][0], CASES[case][0]), case)))


def same_work(ours: dict, trl: dict) -> None:
    """Refuse a comparison of unequal lengths."""
    for name in ("prompt_tokens", "completion_tokens"):
        if ours[name] != trl[name]:
            raise RuntimeError(f"{name}: {ours[name]} here, {trl[name]} in TRL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(TARGETS), choices=list(CASES))
    parser.add_argument("--side", choices=("ours", "trl"), help="only this one, as JSON")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder for the random checkpoints")
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    settings = parser.parse_args()
    if settings.side:
        return one_side(settings.side, settings.cases[0], settings.models)
    print(f"{'':14}{'':6}{'generation':>11}{'scoring':>9}{'update':>9}{'total, s':>10}{'extra MB':>10}{'images':>10}")
    rows, ratios = [], {}
    for case in settings.cases:
        results = {side: measure(side, case, settings.models) for side in ("ours", "trl")}
        same_work(*results.values())
        for side, result in results.items():
            print(f"{case:14}{side:6}{result['generation']:11.2f}{result['scoring']:9.2f}{result['update']:9.2f}"
                  f"{result['total']:10.2f}{result['extra_bytes'] / 1e6:10.0f}{result['images']:10}", flush=True)
            rows.append({"case": case, "side": side, **result})
        ratios[case] = results["trl"]["total"] / results["ours"]["total"]
        ratios["memory"] = max(ratios.get("memory", 0), results["ours"]["extra_bytes"] / results["trl"]["extra_bytes"])
    summary = "ratios: " + ", ".join(f"{name} {value:.2f}" for name, value in
                                     sorted(ratios.items(), key=lambda item: item[0] == "memory"))
    if settings.record:
        append("update_vs_trl", {"G": G, "prompts": PROMPTS, "updates": UPDATES}, rows, summary)
    print(summary)


if __name__ == "__main__":
    main()
