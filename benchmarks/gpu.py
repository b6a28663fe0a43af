"""The engine on a GPU, in the real shapes: random Qwen2.5-VL weights, bfloat16 compute, two images, G = 8.

    python -m benchmarks.gpu [--record]                       3B: all of it; 7B: all but the update
    python -m benchmarks.gpu --shapes tiny --prompts 1 …      the same code on whatever there is, to try it

3B's update runs with float32 masters and gradients, its step with Adam, too (50 GB). 7B's would take 113 GB for these
alone, so it is left out. The rollout's limit is the memory's: every step reads the weights and the cached keys and
values once; what it reaches is held against a measured copy, what scoring and update reach against a measured product.
A step of several tokens a row is one with guesses (speculation.FIXED follows from these times; what guesses gain is
benchmarks.speculation's, with a trained model: random weights never say the same twice).
transformers' `generate` continues the same prompts, all in one batch, with num_return_sequences = G.
"""

import argparse
import math
import statistics
import time
from types import SimpleNamespace

import torch

from benchmarks.record import append, stock_sampling, without_vision_operators
from grpo.engine.speculation import Speculation

SHAPES = {  # of the published checkpoints' config.json
    "3b": dict(hidden=2048, layers=36, heads=16, key_value_heads=2, intermediate=11008, vocabulary=151_936, tied=True,
               vision_hidden=1280, vision_depth=32, vision_intermediate=3420, vision_heads=16),
    "7b": dict(hidden=3584, layers=28, heads=28, key_value_heads=4, intermediate=18944, vocabulary=152_064, tied=False,
               vision_hidden=1280, vision_depth=32, vision_intermediate=3420, vision_heads=16),
    "tiny": dict(hidden=128, layers=2, heads=4, key_value_heads=2, intermediate=256, vocabulary=2_048, tied=True,
                 vision_hidden=64, vision_depth=2, vision_intermediate=128, vision_heads=4),
}
IMAGE, VIDEO, START, END = 900, 901, 902, 903  # ids of the special tokens: any will do
G, SIDE = 8, 448  # pixels a side of both images: 256 tokens each


def full_attention(depth: int) -> list[int]:
    """The vision encoder's layers that attend over whole images: four, evenly spread, the last among them."""
    return list(range(depth // 4 - 1, depth, max(1, depth // 4)))


def random_model(shape: str, device, dtype):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    s = SHAPES[shape]
    half = s["hidden"] // s["heads"] // 2
    config = Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=s["hidden"],
            num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"],
            num_key_value_heads=s["key_value_heads"],
            intermediate_size=s["intermediate"],
            vocab_size=s["vocabulary"],
            bos_token_id=END,
            eos_token_id=END,
            tie_word_embeddings=s["tied"],
            max_position_embeddings=32_768,
            rope_parameters=dict(
                rope_type="default", mrope_section=[half - 2 * (3 * half // 8)] + [3 * half // 8] * 2, rope_theta=1e6
            ),
        ),
        vision_config=dict(
            hidden_size=s["vision_hidden"],
            depth=s["vision_depth"],
            num_heads=s["vision_heads"],
            intermediate_size=s["vision_intermediate"],
            out_hidden_size=s["hidden"],
            fullatt_block_indexes=full_attention(s["vision_depth"]),
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=s["tied"],
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):  # made where it is used: 7B in float32 would take the host's memory first
            return Qwen2_5_VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def make_prompts(count: int, tokens: int):
    from grpo.engine.rope import rope_positions
    from grpo.group import Prompt

    grid = torch.tensor([[1, SIDE // 14, SIDE // 14]] * 2)
    made = []
    for number in range(count):
        random = torch.Generator().manual_seed(number)
        images = ([START] + [IMAGE] * (SIDE // 28) ** 2 + [END]) * 2
        text = torch.randint(0, IMAGE, (tokens - len(images),), generator=random).tolist()
        ids = torch.tensor(images + text)
        pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 14 * 14, generator=random)
        made.append(Prompt(ids, rope_positions(ids, grid, IMAGE, 2), pixels, grid, None, None, f"prompt/{number}"))
    return made


class Clock:
    """Seconds and peak bytes of what runs inside; the device is waited for."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"

    def __enter__(self):
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_):
        if self.gpu:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        self.peak = torch.cuda.max_memory_allocated() if self.gpu else 0


def rates(device, dtype) -> tuple[float, float]:
    """Operations a second of a large matrix product, bytes a second of a copy (read and written); best of five."""
    size = 8192 if device.type == "cuda" else 1024
    a, big = (
        torch.randn(size, size, device=device, dtype=dtype),
        torch.ones(2**28 if device.type == "cuda" else 2**24, device=device),
    )
    times = {"product": [], "copy": []}
    for _ in range(6):
        with Clock(device) as clock:
            a @ a
        times["product"].append(clock.seconds)
        with Clock(device) as clock:
            big.clone()
        times["copy"].append(clock.seconds)
    return 2 * size**3 / min(times["product"][1:]), 2 * big.nbytes / min(times["copy"][1:])


def layers_of(policy) -> int:
    return sum(p.numel() for p in policy.trunk_layers.parameters())


def rollout_bytes(policy, prompts, tokens: int, width: int) -> float:
    """What every decoding step has to read, summed: weights, prompts' keys and values once, each row's own."""
    text = policy.config.text_config
    a_token = (
        2 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * width
    )
    weights = (layers_of(policy) + text.vocab_size * text.hidden_size) * width
    return tokens * (weights + a_token * sum(map(len, prompts))) + a_token * len(prompts) * G * tokens**2 / 2


def score_operations(policy, groups) -> float:
    """One forward pass: every packed token through the layers, every completion token through the head."""
    text = policy.config.text_config
    head = sum(sum(group.lengths) for group in groups) * text.vocab_size * text.hidden_size
    pairs = sum(len(g.prompt) ** 2 / 2 + sum(n * len(g.prompt) + n * n / 2 for n in g.lengths) for g in groups)
    return (
        2 * (layers_of(policy) * sum(g.packed_tokens for g in groups) + head)
        + 4 * text.hidden_size * text.num_hidden_layers * pairs
    )


class Forced(Speculation):
    """Always so many guesses a step."""

    def __init__(self, guessed: int):
        super().__init__()
        self.guessed = guessed

    def width(self, rows, places):
        return self.guessed


def seconds_of_steps(device, rollout) -> float:
    """The median of a rollout's replayed steps; NaN where none is, as on a CPU."""
    from grpo.engine import static

    run, times = static.run, []

    def timed(bucket, pool):
        replayed = bucket.graph is not None
        with Clock(device) as clock:
            run(bucket, pool)
        if replayed:
            times.append(clock.seconds)

    static.run = timed
    try:
        rollout()
    finally:
        static.run = run
    return statistics.median(times) if times else math.nan


def measure(shape: str, settings, device) -> list[dict]:
    """Rows of one shape: images, rollouts, steps of several widths, scoring, update where asked for, and generate."""
    from grpo.engine import static
    from grpo.engine.policy import Policy
    from grpo.engine.rollout import Sampling
    from grpo.engine.sizes import WIDTHS
    from grpo.runtime.fsdp import encode_images_unsharded, sample_unsharded, shard

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    products, copies = rates(device, dtype)
    updates = shape in settings.update
    prompts = make_prompts(settings.prompts, settings.prompt_tokens)
    policy = Policy(random_model(shape, device, torch.float32 if updates else dtype))
    policy.freeze_vision()
    shard(policy, dtype, device)
    rows, name = [], f"{shape}, {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}"

    def row(phase: str, clock: Clock, **figures):
        seconds = {} if "milliseconds" in figures else {"seconds": clock.seconds, "peak_bytes": clock.peak}
        rows.append({"shape": name, "phase": phase, **seconds, **figures})
        print(rows[-1], flush=True)

    for turn in range(2):  # the first one warms
        for prompt in prompts:
            prompt.features = None
        with Clock(device) as clock:
            encode_images_unsharded(policy, prompts)
    row("images", clock, images=2 * len(prompts))

    def rollout(tokens: int, speculation=None):
        sampling = Sampling(tokens, (), 0.8, rows=settings.prompts * G)
        with Clock(device) as clock:
            groups = sample_unsharded(policy, prompts, G, sampling, speculation=speculation)
        return groups, clock, settings.prompts * G * tokens / clock.seconds

    rollout(4)
    _, prefill, _ = rollout(1)
    row("prefill and first token", prefill)
    limit = lambda tokens: rollout_bytes(policy, prompts, tokens, dtype.itemsize) / copies
    static.CAPTURE, few = False, min(settings.tokens, 128)
    _, clock, speed = rollout(few)
    row("rollout without graphs", clock, tokens=few, tokens_per_second=speed,
        share_of_memory_limit=limit(few) / clock.seconds)
    static.CAPTURE = True
    groups, clock, speed = rollout(settings.tokens)
    row("rollout", clock, tokens_per_second=speed, share_of_memory_limit=limit(settings.tokens) / clock.seconds,
        of_the_steps=limit(settings.tokens) / (clock.seconds - prefill.seconds))
    for guessed in WIDTHS:
        seconds = seconds_of_steps(device, lambda: rollout(static.LONG, Forced(guessed)))  # from which on it guesses
        if seconds == seconds:
            row(f"a step of {1 + guessed} tokens a row", clock, milliseconds=1e3 * seconds)

    training(policy, groups, settings, updates, products, row)
    policy = None  # its memory is the other model's
    if device.type == "cuda":
        torch.cuda.empty_cache()

    # its images included, which are a row of their own above
    clock = stock_generation(random_model(shape, device, dtype), prompts, few, device)
    row("generate", clock, tokens=few, tokens_per_second=settings.prompts * G * few / clock.seconds)
    return rows


def training(policy, groups: list, settings, updates: bool, products: float, row) -> None:
    """Rows of scoring and, where asked for, of an update's passes and its step."""
    from grpo.group import make_packs
    from grpo.runtime.fsdp import reshard
    from grpo.runtime.optim import backward, make_optimizer, optimizer_step, packed_pass, set_gradient_checkpointing

    device = policy.device
    packs, work = make_packs(groups, settings.tokens_per_pass, device), score_operations(policy, groups)
    own = torch.cat([logp for group in groups for logp in group.logps]).to(device)
    for turn in range(2):
        with torch.no_grad(), Clock(device) as clock:
            scored = torch.cat([policy.score(pack.groups, 0.8).logp for pack in packs])
            reshard(policy)
    row("score", clock, share_of_product_peak=work / products / clock.seconds,
        sampler_and_scorer=float((scored - own).abs().mean()))
    if updates:
        set_gradient_checkpointing(policy, settings.gradient_checkpointing)
        optimizer = make_optimizer(policy, SimpleNamespace(weight_decay=0.0, learning_rate=1e-6, adam_beta1=0.9,
                                                           adam_beta2=0.999, offload_optimizer=False))
        total = float(sum(sum(group.lengths) for group in groups))
        for turn in range(2):
            optimizer.zero_grad()
            with Clock(device) as clock:
                for pack in packs:
                    with packed_pass(pack):
                        backward(-policy.score(pack.groups, 0.8).logp.sum() / total)
        row("update, its passes", clock, passes=len(packs), share_of_product_peak=3 * work / products / clock.seconds)
        for turn in range(2):
            for parameter in policy.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            with Clock(device) as step:
                optimizer_step(policy, optimizer, torch.zeros((), device=device), 1.0, 1e-6)
        row("its step", step, share_of_product_peak=3 * work / products / (clock.seconds + step.seconds))


def stock_generation(model, prompts, tokens: int, device) -> Clock:
    """transformers' generate on the same prompts in one batch, after a few tokens to warm."""
    ids = torch.stack([prompt.tokens for prompt in prompts]).to(device)
    given = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.cat([prompt.pixels for prompt in prompts]).to(device, model.dtype),
        image_grid_thw=torch.cat([prompt.grids for prompt in prompts]).to(device),
        mm_token_type_ids=(ids == IMAGE).int(),
    )
    with torch.no_grad():
        model.generate(**given, **stock_sampling(G, 4))
        with Clock(device) as clock:
            model.generate(**given, **stock_sampling(G, tokens))
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["3b", "7b"], choices=list(SHAPES))
    parser.add_argument("--update", nargs="*", default=["3b", "tiny"], help="shapes whose update is measured too")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=512, help="new tokens of every completion")
    parser.add_argument("--tokens_per_pass", type=int, default=10_500)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    settings = parser.parse_args()
    without_vision_operators()
    from grpo.runtime.dist import finish, start

    device = start()
    rows = [row for shape in settings.shapes for row in measure(shape, settings, device)]
    speed = {(row["shape"], row["phase"]): row.get("tokens_per_second") for row in rows}
    summary = "; ".join(
        f"{shape}: {speed[shape, 'rollout']:,.0f} tokens a second, generate {speed[shape, 'generate']:,.0f}"
        for shape in dict.fromkeys(row["shape"] for row in rows)
    )
    print(summary)
    if settings.record:
        append("gpu", {name: str(value) for name, value in vars(settings).items() if name != "record"}, rows, summary)
    finish()


if __name__ == "__main__":
    main()
