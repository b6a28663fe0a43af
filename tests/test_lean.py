"""A layer keeps for its backward only what it would be dear to make again, and computes what transformers computes."""

from types import SimpleNamespace

import pytest
import torch
from tiny_backbones import policy_of
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm, Qwen2MLP

from grpo.engine.lean import Gated, GatedLinear, LeanMLP, LeanNorm, make_lean
from grpo.engine.lora import LoraLinear
from tiny import tiny_groups, tiny_policy

HIDDEN, WIDE = 6, 10


def mlp(dtype=torch.float32, activation="silu"):
    torch.manual_seed(0)
    return Qwen2MLP(SimpleNamespace(hidden_size=HIDDEN, intermediate_size=WIDE, hidden_act=activation)).to(dtype)


def norm(dtype=torch.float32):
    module = Qwen2_5_VLRMSNorm(HIDDEN, eps=1e-2)
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
    return module.to(dtype)


def value_and_gradients(module, x, upstream):
    y = module(x)
    return y, *torch.autograd.grad((y * upstream).sum(), [x, *module.parameters()])


def kept_bytes(function, parameters) -> int:
    """What autograd keeps of `function()` for the backward, weights aside, each storage once."""
    ours, storages = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor  # alive: no other may come to the same place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in storages.items() if place not in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stock, lean", [(mlp, LeanMLP), (norm, LeanNorm)], ids=["mlp", "norm"])
def test_values_are_those_of_transformers_to_the_bit_and_gradients_are_equal(stock, lean, dtype):
    module = stock(dtype)
    x, upstream = torch.randn(2, 5, HIDDEN, dtype=dtype, requires_grad=True), torch.randn(2, 5, HIDDEN, dtype=dtype)
    (y, *expected), (lean_y, *found) = (value_and_gradients(m, x, upstream) for m in (module, lean(module)))
    assert torch.equal(y, lean_y)
    for a, b in zip(expected, found):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **({} if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)))


def test_the_norms_gradients_are_those_of_its_formula_in_float64():
    module = norm()
    x, upstream = torch.randn(2, 5, HIDDEN, requires_grad=True), torch.randn(2, 5, HIDDEN)
    wide, weight = x.detach().double().requires_grad_(), module.weight.detach().double().requires_grad_()
    y = weight * wide / (wide.square().mean(-1, keepdim=True) + 1e-2).sqrt()
    expected = torch.autograd.grad((y * upstream).sum(), [wide, weight])
    for a, b in zip(value_and_gradients(LeanNorm(module), x, upstream), (y, *expected)):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)


def test_the_products_gradients_are_finite_differences():
    gate, up = torch.randn(2, 2, 3, WIDE, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((HIDDEN, WIDE), (HIDDEN,)))
    assert torch.autograd.gradcheck(Gated.apply, (gate, up))
    assert torch.autograd.gradcheck(GatedLinear.apply, (gate, up, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_keeps_its_input_gate_and_up_and_a_norm_its_input(dtype):
    x = torch.randn(1, 7, HIDDEN, requires_grad=True, dtype=dtype)
    for module, numbers in ((LeanMLP(mlp(dtype)), HIDDEN + 2 * WIDE), (LeanNorm(norm(dtype)), HIDDEN)):
        assert kept_bytes(lambda: module(x), module.parameters()) == 7 * numbers * x.element_size()


def test_an_adapters_mlp_keeps_the_product_too_and_its_gradients_are_those_of_transformers():
    module = mlp().requires_grad_(False)
    module.down_proj = LoraLinear(module.down_proj, 2, 4.0, 0.0)
    for part in (module.down_proj.lora_A, module.down_proj.lora_B):
        nn.init.normal_(part, generator=torch.Generator().manual_seed(1))
    x, upstream = torch.randn(1, 7, HIDDEN, requires_grad=True), torch.randn(1, 7, HIDDEN)
    trained = [x, module.down_proj.lora_A, module.down_proj.lora_B]
    y, lean_y = module(x), LeanMLP(module)(x)
    assert torch.equal(y, lean_y)
    for a, b in zip(*(torch.autograd.grad((output * upstream).sum(), trained) for output in (y, lean_y))):
        torch.testing.assert_close(a, b)


def test_a_frozen_mlp_computes_no_weight_gradient():
    module = mlp().requires_grad_(False)
    output = LeanMLP(module)(torch.randn(1, 7, HIDDEN, requires_grad=True))
    assert GatedLinear.backward(output.grad_fn, torch.ones(1, 7, HIDDEN))[2:] == (None, None)


def test_a_packed_pass_keeps_no_more_than_it_needs_for_every_token_and_layer():
    policy, groups = tiny_policy(), tiny_groups(lengths=((60,), (80,)))
    policy.freeze_vision()
    policy.keep_image_features([group.prompt for group in groups])
    text, tokens = policy.config.text_config, sum(len(group.prompt) + group.lengths[0] - 1 for group in groups)
    heads = text.num_attention_heads
    # inputs and outputs of both norms, attention's output as heads and as rows, queries, keys and values (half as many
    # heads); gate and up; a number a norm, and one a head: the logarithm of its softmax's norm
    layer = 8 * text.hidden_size + 2 * text.intermediate_size + 2 + heads
    # beside the layers: the last norm, the head's input, cosines and sines
    beside = 2 * text.hidden_size + 1 + 2 * text.hidden_size // heads
    kept = kept_bytes(lambda: policy.score(groups).logp, policy.parameters())
    assert kept < 1.02 * 4 * tokens * (text.num_hidden_layers * layer + beside)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "qwen3_vl"])
def test_every_backbones_language_model_is_lean_under_the_names_of_its_checkpoint(name):
    policy = tiny_policy() if name == "qwen2_5_vl" else policy_of(name)
    names = list(policy.state_dict())
    for layer in policy.trunk_layers:
        assert isinstance(layer.mlp, LeanMLP)
        assert isinstance(layer.input_layernorm, LeanNorm) and isinstance(layer.post_attention_layernorm, LeanNorm)
    assert isinstance(policy.model.model.language_model.norm, LeanNorm)
    assert "model.model.language_model.layers.0.mlp.down_proj.weight" in names
    assert "model.model.language_model.layers.0.input_layernorm.weight" in names


def test_an_mlp_of_another_activation_stays_as_it_is():
    network = nn.Sequential(mlp(activation="gelu"), mlp(), nn.LayerNorm(HIDDEN), norm())
    make_lean(network)
    assert [type(module) for module in network] == [Qwen2MLP, LeanMLP, nn.LayerNorm, LeanNorm]
