"""The update's pass alone, forward and backward, against the PyPI package prefix-grouper 0.0.1.

    pip install prefix-grouper        # MIT; pure Python
    python -m benchmarks.prefix_grouper [--record]

It too computes a prompt once for its G completions, as a replacement of the attention of a transformers model: prompt
and completions stand in one padded row, each layer cuts queries, keys and values apart, and calls an attention
function (here SDPA with a causal mask, made once a pass; its own choice, FlashAttention, needs a GPU) once for the
prompts and once for all completions, with the prompt's keys repeated G times. Both sides get the same weights,
prompts with two images' features in them, and completions of unequal lengths (half to all of the case's tokens, so
that padding has its price), and return the completions' log-probabilities; the loss is their mean. Its log-
probabilities are taken as its documentation does, from all logits. Values and gradients are compared first. Best of
three, seconds and the peak of memory beyond what is held before, side by side in one process.
"""

import argparse
import time

import torch

from benchmarks.record import PeakMemory, append
from benchmarks.shapes import MODELS, images, whole_vocabulary, words_for, write_model
from benchmarks.update_vs_trl import CASES, PROMPTS, G
from grpo.engine.encode import Encoder
from grpo.engine.weights import load_policy
from grpo.group import Group


def register_attention() -> None:
    """As "prefix_grouper" in transformers."""
    from prefix_grouper.forward import AttentionForward
    from transformers import AttentionInterface

    def masked(q, k, v, seen, module, scaling, masks):
        """seen (B, keys): no padding. The last query sees the last key."""
        if seen.shape not in masks:
            causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            masks[seen.shape] = (causal & seen[:, None, None].bool()) | torch.eye(k.shape[2])[-q.shape[2]:].bool()
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, masks[seen.shape], scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)

    def forward(module, q, k, v, mask, scaling=None, prefix_grouper=None, masks=None, **more):
        return AttentionForward(masked)(prefix_grouper, q, k, v, module, scaling, masks), None

    AttentionInterface.register("prefix_grouper", forward)


def prefix_grouper_logp(stock, policy, groups: list[Group]) -> torch.Tensor:
    """Log-probabilities of all completions' tokens, end to end."""
    from prefix_grouper import PrefixGrouper

    prompts = [group.prompt for group in groups]
    info = [[len(group.prompt), *group.lengths] for group in groups]
    grouper = PrefixGrouper(info, padding_mode="right")
    longest = max(map(sum, info))
    embedded = policy.embed(prompts).split([len(prompt) for prompt in prompts])
    rows, positions = [], []
    for group, vectors in zip(groups, embedded):
        first = int(group.prompt.positions.max()) + 1
        parts = [group.prompt.positions, *(first + torch.arange(n).expand(3, n) for n in group.lengths)]
        row = torch.cat([vectors, *map(policy.embed_tokens, group.completions)])
        rows.append(torch.nn.functional.pad(row, (0, 0, 0, longest - len(row))))
        place = torch.cat(parts, 1)
        positions.append(torch.nn.functional.pad(place, (0, longest - place.shape[1])))
    hidden = stock.model.language_model(
        inputs_embeds=torch.stack(rows), position_ids=torch.stack(positions, 1),
        attention_mask={"full_attention": None}, use_cache=False, prefix_grouper=grouper, masks={}).last_hidden_state
    _, _, suffix, mask = grouper.split_output(stock.lm_head(hidden), include_prefix_last=1)
    logits, mask = suffix[:, :-1], mask[:, 1:]
    tokens = torch.nn.utils.rnn.pad_sequence([c for group in groups for c in group.completions], batch_first=True)
    return (logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1))[mask.bool()]


def measure(logp, parameters) -> tuple[float, int]:
    """Best seconds and most extra bytes of forward and backward."""
    best, most = float("inf"), 0
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = None
        memory, start = PeakMemory(), time.perf_counter()
        memory.start()
        logp().mean().backward()
        best, most = min(best, time.perf_counter() - start), max(most, memory.beyond())
    return best, most


def sides(case: str) -> list[dict]:
    from transformers import Qwen2_5_VLForConditionalGeneration

    shape, length, side, most = CASES[case]
    folder = str(write_model(MODELS / shape, shape))
    whole_vocabulary()
    encoder, policy = Encoder(folder), load_policy(folder)
    policy.banned = ()  # the other side has no ban
    policy.freeze_vision()
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    stock.model.visual.requires_grad_(False)
    stock.model.language_model.config._attn_implementation = "prefix_grouper"
    text, draw = words_for(encoder, length, side), torch.Generator().manual_seed(0)
    prompts = [encoder.encode(images(seed, side), text, None, f"prompt/{seed}") for seed in range(PROMPTS)]
    policy.keep_image_features(prompts)
    lengths = torch.randint(most // 2, most + 1, (PROMPTS, G), generator=draw).tolist()
    groups = [Group(prompt, [torch.randint(3, 250, (n,), generator=draw) for n in some])
              for prompt, some in zip(prompts, lengths)]
    runs = {"ours": (lambda: policy.score(groups).logp, policy.model),
            "prefix-grouper": (lambda: prefix_grouper_logp(stock, policy, groups), stock)}
    values, slopes = {}, {}
    for name, (logp, model) in runs.items():
        values[name] = logp()
        values[name].mean().backward()
        slopes[name] = torch.cat([p.grad.flatten() for layer in model.model.language_model.layers
                                  for p in layer.parameters()])
    difference = (values["ours"] - values["prefix-grouper"]).abs().max().item()
    slope = ((slopes["ours"] - slopes["prefix-grouper"]).norm() / slopes["ours"].norm()).item()
    print(f"{case}: largest difference of a log-probability {difference:.1e}, of the layers' gradient {slope:.1e}")
    if difference > 1e-3 or slope > 1e-3:
        raise SystemExit(f"{case}: the two sides do not compute the same")
    return [dict(zip(("case", "side", "seconds", "extra_bytes"), (case, name, *measure(logp, [*model.parameters()]))))
            for name, (logp, model) in runs.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[case for case in CASES if case != "small"], choices=list(CASES))
    parser.add_argument("--record", action="store_true", help="append the figures to results.jsonl")
    settings = parser.parse_args()
    register_attention()
    rows, ratios = [], []
    for case in settings.cases:
        rows += (found := sides(case))
        ratios.append(f"{case} {found[1]['seconds'] / found[0]['seconds']:.2f}")
        for row in found:
            print(f"{case:16}{row['side']:16}{row['seconds']:8.2f} s{row['extra_bytes'] / 1e6:8.0f} MB", flush=True)
    summary = "prefix-grouper's time over ours: " + ", ".join(ratios)
    print(summary)
    if settings.record:
        append("prefix_grouper", {"prompts": PROMPTS, "G": G}, rows, summary)


if __name__ == "__main__":
    main()
