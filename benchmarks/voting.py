"""Majority voting's sampling: 100 completions a prompt against transformers' generate(num_return_sequences=100).

    python -m benchmarks.voting [--record]

The trunk shape, 4 prompts of 800 tokens with two images, 100 new tokens each, float32. `generate` gets one prompt at a
time (its best case: nothing is padded) and expands it to 100 rows before the prefill; both sides draw from the full
softmax at temperature 0.8 and may not end early. Keys and values are counted from the caches' shapes, both complete.
"""

import argparse
import time

import torch

from benchmarks.record import append, stock_sampling, without_vision_operators
from benchmarks.shapes import MODELS, images, whole_vocabulary, words_for, write_model

PROMPTS, SAMPLES, TOKENS, PROMPT_TOKENS, SIDE = 4, 100, 100, 800, 448


def ours(policy, prompts) -> float:
    from grpo.engine.rollout import Sampling, sample

    start = time.perf_counter()
    policy.keep_image_features(prompts)
    groups = sample(policy, prompts, SAMPLES, Sampling(TOKENS, (), 0.8, rows=SAMPLES))
    assert all(len(completion) == TOKENS for group in groups for completion in group.completions)
    return time.perf_counter() - start


def theirs(model, prompts) -> float:
    settings = stock_sampling(SAMPLES, TOKENS)
    start = time.perf_counter()
    for prompt in prompts:
        tokens = prompt.tokens[None].to(model.device)
        out = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=prompt.pixels.to(model.device),
            image_grid_thw=prompt.grids.to(model.device),
            mm_token_type_ids=(tokens == model.config.image_token_id).int(), **settings)
        assert out.shape == (SAMPLES, len(prompt) + TOKENS)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="trunk")
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    settings = parser.parse_args()
    without_vision_operators()
    from transformers import Qwen2_5_VLForConditionalGeneration

    from grpo.engine.encode import Encoder
    from grpo.engine.weights import load_policy

    folder = str(write_model(MODELS / settings.shape, settings.shape))
    whole_vocabulary()
    encoder, policy = Encoder(folder), load_policy(folder).requires_grad_(False)
    text = words_for(encoder, PROMPT_TOKENS, SIDE)
    prompts = [encoder.encode(images(i, SIDE), text, None, f"prompt/{i}") for i in range(PROMPTS)]
    seconds = {"ours": ours(policy, prompts)}
    config = policy.config.text_config
    del policy
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        seconds["generate"] = theirs(model, prompts)

    token = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * (config.hidden_size // config.num_attention_heads)
        * 4
    )
    cached = {"ours": PROMPT_TOKENS + SAMPLES * TOKENS, "generate": SAMPLES * (PROMPT_TOKENS + TOKENS)}
    rows = []
    print(f"{'':10}{'seconds':>9}{'tokens/s':>10}{'prompt copies':>15}{'keys and values, MB':>21}")
    for side, value in seconds.items():
        rows.append({"side": side, "seconds": value, "tokens_per_second": PROMPTS * SAMPLES * TOKENS / value,
                     "prompt_copies": 1 if side == "ours" else SAMPLES, "cache_bytes": cached[side] * token})
        print(f"{side:10}{value:9.1f}{rows[-1]['tokens_per_second']:10.0f}{rows[-1]['prompt_copies']:15}"
              f"{cached[side] * token / 1e6:21.0f}")
    summary = f"ratio: {seconds['generate'] / seconds['ours']:.2f}"
    if settings.record:
        append(
            "voting", {"shape": settings.shape, "prompts": PROMPTS, "samples": SAMPLES, "tokens": TOKENS}, rows, summary
        )
    print(summary)


if __name__ == "__main__":
    main()
