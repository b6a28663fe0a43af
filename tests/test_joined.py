"""Attention in two calls: its joins and gradients against one call for each completion. The kernels themselves are a
GPU's; here their definition stands in for them, and `benchmarks.check` tries them on the real thing."""

import pytest
import torch

from grpo.engine import attention, joined
from grpo.engine.attention import Packed
from grpo.engine.joined import in_two_calls
from grpo.engine.split_group import Behind, split
from grpo.group import make_packs
from grpo.runtime.optim import backward, passes
from tiny import tiny_groups, tiny_policy, tiny_prompt


def pairs(queries, keys):
    assert queries.longest == int(queries.offsets.diff().max()) and keys.longest == int(keys.offsets.diff().max())
    assert queries.offsets.dtype == keys.offsets.dtype == torch.int32  # else the kernel reads other numbers
    assert int(queries.offsets.diff().min()) and len(queries.offsets) == len(keys.offsets)  # an empty one: not promised
    spans = [list(zip(x.offsets.tolist(), x.offsets.tolist()[1:])) for x in (queries, keys)]
    return [(slice(*q), slice(*k)) for q, k in zip(*spans)]


def scores_of(query, key, causal, scaling):
    """(T, H, d), (S, H_kv, d) → (H, T, S)."""
    scores = torch.einsum("thd,shd->hts", query, key.repeat_interleave(query.shape[1] // key.shape[1], 1)) * scaling
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
    return scores.masked_fill(future, float("-inf")) if causal else scores


def flash(query, key, value, queries, keys, causal, scaling):
    flash.calls += 1
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
    for q, k in pairs(queries, keys):
        scores = scores_of(query[q], key[k], causal, scaling)
        lse[:, q] = scores.logsumexp(-1)
        out[q] = torch.einsum("hts,shd->thd", scores.softmax(-1),
                              value[k].repeat_interleave(query.shape[1] // key.shape[1], 1))
    return out, lse


def flash_backward(grad, query, key, value, out, lse, queries, keys, causal, scaling):
    """By the formulas of the paper of flash attention (arXiv 2307.08691, algorithm 2), which know only `lse`."""
    flash.calls += 1
    shared = query.shape[1] // key.shape[1]
    to_key_heads = lambda x: x.unflatten(1, (-1, shared)).sum(2)
    dq, dk, dv = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for q, k in pairs(queries, keys):
        weights = (scores_of(query[q], key[k], causal, scaling) - lse[:, q, None]).exp()
        wide_value = value[k].repeat_interleave(shared, 1)
        along = (grad[q] * out[q]).sum(-1).T[..., None]
        dscores = weights * (torch.einsum("thd,shd->hts", grad[q], wide_value) - along) * scaling
        dv[k] = to_key_heads(torch.einsum("hts,thd->shd", weights, grad[q]))
        dk[k] = to_key_heads(torch.einsum("hts,thd->shd", dscores, query[q]))
        dq[q] = torch.einsum("hts,shd->thd", dscores, key[k].repeat_interleave(shared, 1))
    return dq, dk, dv


@pytest.fixture
def two_calls(monkeypatch):
    flash.calls = 0
    monkeypatch.setattr(joined, "flash", flash)
    monkeypatch.setattr(joined, "flash_backward", flash_backward)

    def switch(on: bool):
        for module in (attention, joined):
            monkeypatch.setattr(module, "in_two_calls", lambda query: on)

    return switch


def attended(layout, tensors, weight, cache=None):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = layout().attend(0, *leaves, 0.3)
    (out * weight).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


SEGMENTS = {"ragged": [(7, [5, 1, 3]), (4, [2, 6])], "nothing to read": [(3, [0, 0]), (5, [4, 0, 2])],
            "one completion": [(6, [3]), (2, [1, 1])], "prompts alone": [(6, []), (3, [])]}


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_two_calls_give_what_a_call_for_each_completion_gives(two_calls, segments):
    rows = sum(p + sum(lengths) for p, lengths in segments)
    tensors = [torch.randn(1, heads, rows, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    weight = torch.randn(1, rows, 4, 8, dtype=torch.float64)
    two_calls(False)
    plain = attended(lambda: Packed(segments), tensors, weight)
    assert not flash.calls
    two_calls(True)
    for expected, found in zip(plain, attended(lambda: Packed(segments), tensors, weight)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert flash.calls == (2 if segments == SEGMENTS["prompts alone"] else 4)


def test_a_prefill_in_two_calls_keeps_the_same_keys_and_values(two_calls):
    tensors, caches = [torch.randn(1, heads, 9, 8) for heads in (4, 2, 2)], ([], [])
    for on, cache in enumerate(caches):
        two_calls(bool(on))
        layout = Packed([(6, []), (3, [])], prompt_cache=cache)
        for layer in (0, 1, 1):  # the last one is a recomputation
            layout.attend(layer, *tensors, 0.3)
    for plain, found in zip(*([x for layer in cache for pair in layer for x in pair] for cache in caches)):
        assert torch.equal(plain, found)
    assert [len(cache) for cache in caches] == [2, 2]


def test_completions_behind_prompts_of_a_pass_before_in_two_calls(two_calls):
    lengths, sizes = [[3, 0, 2], [0], [4]], (5, 3, 6)
    kept = [torch.randn(1, 2, size, 8, dtype=torch.float64) for size in sizes for _ in range(2)]
    tensors = [torch.randn(1, heads, 9, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    weight, results = torch.randn(1, 9, 4, 8, dtype=torch.float64), []
    for on in (False, True):
        two_calls(on)
        leaves = [x.clone().requires_grad_() for x in kept]
        prompts = [([leaves[i]], [leaves[i + 1]]) for i in (0, 2, 4)]
        results.append([*attended(lambda: Behind(prompts, lengths), tensors, weight),
                        *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)])
    for plain, found in zip(*results):
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    assert flash.calls == 4


@pytest.mark.parametrize("budget", [1000, 30])
def test_an_update_in_two_calls_a_layer_has_the_same_gradients(two_calls, budget):
    results = []
    for on in (False, True):
        two_calls(on)
        policy, logps = tiny_policy().double(), []
        for pack, score in passes(policy, split(make_packs(tiny_groups(), budget, "cpu"), budget), 0.8):
            scores = score()
            backward(scores.logp.square().sum())
            logps.append(scores.logp.detach())
        results.append([torch.cat(logps), *(p.grad for p in policy.parameters() if p.grad is not None)])
    for plain, found in zip(*results):
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-11)


def test_two_calls_are_a_gpus_in_half_precision():
    assert not in_two_calls(torch.zeros(1, 4, 9, 128, dtype=torch.bfloat16))


def test_the_vision_encoder_calls_once_a_layer_and_only_where_there_is_a_kernel(two_calls):
    features, names = [], []
    for on in (False, True):
        two_calls(on)
        policy = tiny_policy().double()
        prompt = tiny_prompt(0, ((1, 8, 12), (1, 4, 4)))
        features.append(policy.encode_images([prompt])[0])
        names.append(policy.visual.config._attn_implementation)
        assert policy.text_config._attn_implementation == "layout"
    torch.testing.assert_close(*features, rtol=1e-9, atol=1e-11)
    assert names == ["sdpa", "flash_segments"] and flash.calls == len(policy.visual.blocks)
