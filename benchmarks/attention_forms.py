"""Which form of attention should score a packed group: one prompt, G continuations behind it?

    python -m benchmarks.attention_forms [--record]

Forward and backward of one layer's attention (7B's head size, 8 heads on 2 key heads), seconds as multiples of the form
that is used. All forms compute the same; what differs is how many scores, copies and calls they take:
    dense          one call over the group with a (T, T) mask: (P + ΣC)² scores
    joint          the prompt causal; one call of all continuations against prompt and all continuations, masked
    padded batch   the prompt causal; one call of G rows, each with its own copy of the prompt's keys, padded to the longest
    one by one     the prompt causal; one call a continuation against prompt and own keys, lower-right causal   (used)
    flex           FlexAttention with a block mask over the group; on a GPU only, it has no backward on a CPU
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import append
from grpo.engine.attention import Packed

HEADS, KEY_HEADS, SIZE = 8, 2, 128
# prompt tokens, lengths of the continuations
CASES = {
    "P 200, 8 × 64": (200, [64] * 8),
    "P 800, 8 × 64": (800, [64] * 8),
    "P 800, 8 × 256": (800, [256] * 8),
    "P 800, 8 ragged to 400": (800, [20, 45, 80, 110, 150, 210, 290, 400]),
    "P 1000, 64 × 64": (1000, [64] * 64),
}


def mask_of_group(prompt: int, lengths: list[int], device) -> Tensor:
    """(T, T) bool: the prompt causal, each continuation behind it and itself."""
    owner = torch.cat([torch.full((n,), i) for i, n in enumerate([prompt, *lengths])]).to(device)
    earlier = torch.ones(len(owner), len(owner), dtype=torch.bool, device=device).tril()
    return earlier & ((owner[:, None] == owner) | (owner == 0))


def attend(q, k, v, mask=None):
    if q.is_cuda:
        k, v = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=not q.is_cuda)


def dense(q, k, v, prompt, lengths):
    mask = mask_of_group(prompt, lengths, q.device)
    return lambda q, k, v: attend(q, k, v, mask)


def joint(q, k, v, prompt, lengths):
    mask = mask_of_group(prompt, lengths, q.device)[prompt:]

    def form(q, k, v):
        (first, rest), (key, _), (value, _) = (x.split([prompt, sum(lengths)], 2) for x in (q, k, v))
        return torch.cat([attend(first, key, value), attend(rest, k, v, mask)], 2)

    return form


def padded_batch(q, k, v, prompt, lengths):
    longest = max(lengths)
    mask = torch.ones(longest, prompt + longest, dtype=torch.bool, device=q.device).tril(prompt)

    def rows(x: Tensor) -> Tensor:
        parts = x[0].split(lengths, 1)
        return torch.stack([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])

    def form(q, k, v):
        (first, rest), (key, suffix_key), (value, suffix_value) = (x.split([prompt, sum(lengths)], 2) for x in (q, k, v))
        copies = lambda shared, own: torch.cat([shared.expand(len(lengths), -1, -1, -1), rows(own)], 2)
        out = attend(rows(rest), copies(key, suffix_key), copies(value, suffix_value), mask)
        return torch.cat([attend(first, key, value), *(row[None, :, :n] for row, n in zip(out, lengths))], 2)

    return form


def one_by_one(q, k, v, prompt, lengths):
    return lambda q, k, v: Packed([(prompt, lengths)]).attend(0, q, k, v, SIZE**-0.5).transpose(1, 2)


def flex(q, k, v, prompt, lengths):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    owner = torch.cat([torch.full((n,), i) for i, n in enumerate([prompt, *lengths])]).to(q.device)
    visible = lambda b, h, i, j: (i >= j) & ((owner[i] == owner[j]) | (owner[j] == 0))
    mask = create_block_mask(visible, None, None, len(owner), len(owner), device=q.device)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)


FORMS = {"dense": dense, "joint": joint, "padded batch": padded_batch, "one by one": one_by_one}


def seconds(form, q, k, v) -> float:
    """One forward and backward pass."""
    start = time.perf_counter()
    form(q, k, v).sum().backward()
    if q.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="rounds; the best of each form counts")
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    settings = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    forms = FORMS | ({"flex": flex} if device == "cuda" else {})
    print(f"{'':24}" + "".join(f"{name:>14}" for name in forms) + f"{'used, ms':>12}")
    rows = []
    for name, (prompt, lengths) in CASES.items():
        tokens = prompt + sum(lengths)
        q, k, v = (torch.randn(1, heads, tokens, SIZE, device=device, dtype=dtype, requires_grad=True)
                   for heads in (HEADS, KEY_HEADS, KEY_HEADS))
        expected = one_by_one(q, k, v, prompt, lengths)(q, k, v)
        functions = {form: make(q, k, v, prompt, lengths) for form, make in forms.items()}
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        for function in functions.values():
            torch.testing.assert_close(function(q, k, v), expected, rtol=tolerance, atol=tolerance)
        rounds = [{form: seconds(function, q, k, v) for form, function in functions.items()} for _ in range(settings.repeats)]
        times = {form: min(times[form] for times in rounds) for form in forms}
        used = times["one by one"]
        print(f"{name:24}" + "".join(f"{value / used:14.2f}" for value in times.values()) + f"{used * 1e3:12.1f}", flush=True)
        rows.append({"case": name, **{form: round(value, 5) for form, value in times.items()}})
    if settings.record:
        append("attention_forms", {"heads": HEADS, "key heads": KEY_HEADS, "head size": SIZE}, rows)


if __name__ == "__main__":
    main()
