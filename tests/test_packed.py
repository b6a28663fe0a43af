"""A rollout's packed copies of the weights: the same products, the same tokens, nothing left behind."""

import pytest
import torch
from tiny_backbones import policy_of
from torch import nn

from grpo.engine import packed as module
from grpo.engine import rollout
from grpo.engine.lora import add_adapter
from grpo.engine.packed import PackedLinear, pack, packed
from grpo.engine.rollout import sample
from test_rollout import prompts, sampling
from tiny import tiny_policy


def copies(policy) -> list[bool]:
    return [layer.copy is not None for layer in policy.modules() if isinstance(layer, PackedLinear)]


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_computes_what_the_layer_does(rows, bias):
    layer, x = nn.Linear(24, 50, bias), torch.randn(2, rows, 24)
    layer.__class__ = PackedLinear
    with torch.no_grad():
        expected = layer(x)
        with packed(layer, True):
            assert layer.copy.is_mkldnn
            torch.testing.assert_close(layer(x), expected)


def test_gradients_do_not_come_from_the_copy():
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    layer.__class__ = PackedLinear
    with packed(layer, True):
        layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, x.sum(0).expand(3, -1))


@pytest.mark.parametrize("weight", [torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.float64),
                                    torch.ones(3, 4, device="meta")], ids=["bfloat16", "float64", "meta"])
def test_a_weight_that_is_not_float32_on_a_cpu_is_left_as_it_is(weight):
    assert pack(weight) is weight


def test_a_rollout_has_copies_of_the_layers_and_leaves_none_behind():
    policy, seen = tiny_policy(), []
    policy.trunk_layers[0].register_forward_pre_hook(lambda *_: seen.append(sum(copies(policy))))
    sample(policy, prompts(2), 2, sampling())
    layers = sum(isinstance(layer, PackedLinear) for layer in policy.language_model.modules())
    assert set(seen) == {layers} and layers == 7 * len(policy.trunk_layers) and not any(copies(policy))


def test_weights_beyond_the_bound_are_not_copied(monkeypatch):
    monkeypatch.setattr(module, "PACKED", 1000)
    policy = tiny_policy()
    with packed(policy.language_model, True):
        assert not any(copies(policy))


@pytest.mark.parametrize("adapter", [False, True])
def test_packed_copies_change_no_token(monkeypatch, adapter):
    policy = tiny_policy()
    if adapter:
        add_adapter(policy, 2, 4.0, "q_proj,down_proj")
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.02 * parameter.requires_grad)
    expected = sample(policy, prompts(2), 3, sampling())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for one, other in zip(expected, sample(policy, prompts(2), 3, sampling())):
        assert [c.tolist() for c in one.completions] == [c.tolist() for c in other.completions]
        torch.testing.assert_close(torch.cat(one.logps), torch.cat(other.logps))


def test_logits_drawn_from_in_parts_give_the_same_tokens(monkeypatch):
    draw = lambda: [c.tolist() for group in sample(tiny_policy(), prompts(), 4, sampling()) for c in group.completions]
    whole, sizes = draw(), []
    monkeypatch.setattr(rollout, "LOGITS", 3 * len(tiny_policy().model.lm_head.weight))
    inner = rollout.token_logits
    note = lambda hidden, *more: sizes.append(len(hidden)) or inner(hidden, *more)
    monkeypatch.setattr(rollout, "token_logits", note)
    assert draw() == whole and max(sizes) == 3
