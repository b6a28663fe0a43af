import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.engine import head
from grpo.engine.head import CompletionLogp, completion_logp, exponential_, token_logits
from grpo.engine.packed import pack

BANNED = (3, 11)
ON = torch.tensor(BANNED)


def plain(hidden, weight, targets, temperature):
    logits = (hidden @ weight.T / temperature).index_fill(-1, ON, float("-inf"))
    logps = logits.log_softmax(-1)
    kept = [i for i in range(len(weight)) if i not in BANNED]
    return logps.gather(-1, targets[:, None])[:, 0], -(logps[:, kept].exp() * logps[:, kept]).sum(-1)


def example():
    hidden = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8, 9, 10])
    return hidden, weight, targets


@pytest.mark.parametrize("kept", [0, 200, 1 << 20], ids=["no logits kept", "some kept", "all kept"])
def test_values_and_gradients_equal_the_plain_softmax_whatever_the_tile(monkeypatch, kept):
    monkeypatch.setattr(head, "KEPT", kept)
    hidden, weight, targets = example()
    upstream = torch.randn(10)
    logp, entropy = plain(hidden, weight, targets, 0.7)
    expected = torch.autograd.grad((logp * upstream).sum(), [hidden, weight])
    for tile in ((1, 1), (3, 4), (4, 6), (10, 17), (64, 64)):
        chunked, chunked_entropy = completion_logp(hidden, weight, targets, 0.7, BANNED, tile)
        torch.testing.assert_close(chunked, logp, rtol=1e-10, atol=1e-12)  # float64 stays float64
        torch.testing.assert_close(chunked_entropy, entropy, rtol=1e-10, atol=1e-12)
        for found, wanted in zip(torch.autograd.grad((chunked * upstream).sum(), [hidden, weight]), expected):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_frozen_head_computes_no_weight_gradient():
    hidden, weight, targets = example()
    logp, _ = completion_logp(hidden, weight.detach(), targets, 1.0, BANNED, (4, 8))
    assert CompletionLogp.backward(logp.grad_fn, torch.ones(10), None)[1] is None


def test_a_banned_token_has_no_probability():
    hidden, weight, _ = example()
    logp, _ = completion_logp(hidden, weight, torch.full((10,), 3), 1.0, BANNED)
    assert torch.isinf(logp).all() and (logp < 0).all()


def test_the_entropy_has_no_gradient():
    hidden, weight, targets = example()
    logp, entropy = completion_logp(hidden, weight, targets, 1.0, BANNED, (4, 8))
    assert logp.requires_grad and not entropy.requires_grad


def test_a_bfloat16_heads_gradient_is_summed_in_float32_over_the_chunks():
    hidden, weight, _ = example()
    hidden, weight = hidden.detach().bfloat16().repeat(60, 1), weight.detach().bfloat16().requires_grad_()
    targets = torch.arange(10).repeat(60).clamp(max=2)
    gradients = []
    for tile in ((1, 17), (600, 17)):
        logp, _ = completion_logp(hidden, weight, targets, 1.0, BANNED, tile)
        gradients.append(torch.autograd.grad(logp.sum(), weight)[0].float())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-2, atol=0.2)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_logits_of_a_row_are_the_same_however_many_rows_come_with_it(dtype, packs):
    hidden, weight = torch.randn(40, 16, dtype=dtype), torch.randn(70, 16, dtype=dtype)
    expected = (hidden @ weight.T / 0.7).to(torch.promote_types(dtype, torch.float32)).index_fill(-1, ON, float("-inf"))
    for rows in (1, 2, 8, 9, 40):
        logits = token_logits(hidden[:rows], pack(weight) if packs else weight, 0.7, BANNED)
        assert logits.is_contiguous() and logits.dtype == torch.promote_types(dtype, torch.float32)
        closeness = dict(rtol=2e-2, atol=5e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits, expected[:rows], **closeness)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        self.numbers = max([self.numbers,
                            *(x.numel() for x in (made if isinstance(made, tuple) else (made,)) if torch.is_tensor(x))])
        return made


@pytest.mark.parametrize("tokens", [10, 60, 600])
def test_logits_that_wait_for_the_backward_are_bounded_and_gone_after_it(monkeypatch, tokens):
    monkeypatch.setattr(head, "KEPT", 4 * 3000)
    hidden, weight = torch.randn(tokens, 6, requires_grad=True), torch.randn(17, 6, requires_grad=True)
    logp, _ = completion_logp(hidden, weight, torch.zeros(tokens, dtype=torch.long), 1.0, BANNED, (16, 8))
    kept = sum(logits.numel() for logits in logp.grad_fn.kept)
    assert kept == 17 * tokens if tokens <= 60 else 3000 - 16 * 8 < kept <= 3000
    gradients = [torch.autograd.grad(logp.sum(), weight, retain_graph=True)[0] for _ in range(2)]
    assert not logp.grad_fn.kept and torch.equal(*gradients)  # a second time they are made again


def test_without_a_gradient_no_logits_are_kept(monkeypatch):
    rooms, apply = [], CompletionLogp.apply
    monkeypatch.setattr(CompletionLogp, "apply", lambda *arguments: rooms.append(arguments[-1]) or apply(*arguments))
    hidden, weight, targets = example()
    completion_logp(hidden, weight, targets, 1.0, BANNED)
    completion_logp(hidden.detach(), weight.detach(), targets, 1.0, BANNED)
    with torch.no_grad():
        completion_logp(hidden, weight, targets, 1.0, BANNED)
    assert [room > 0 for room in rooms] == [True, False, False]


def test_no_tensor_grows_with_tokens_times_vocabulary():
    weight = torch.randn(128, 4, requires_grad=True)
    for tokens in (64, 100):
        hidden = torch.randn(tokens, 4, requires_grad=True)
        with Largest() as largest:
            logp, _ = completion_logp(hidden, weight, torch.zeros(tokens, dtype=torch.long), 0.7, BANNED, (16, 16))
            logp.sum().backward()
        assert largest.numbers == 128 * 4  # the head's own gradient; all logits would be 64 × 128


@pytest.mark.parametrize("dtype,rounding", [(torch.float32, 4e-6), (torch.float64, 1e-14)])
def test_a_power_of_two_is_the_exponential(dtype, rounding):
    x = torch.cat([torch.linspace(-30, 30, 1001, dtype=dtype), torch.tensor([float("-inf"), 0.0], dtype=dtype)])
    torch.testing.assert_close(exponential_(x.clone()), x.exp(), rtol=rounding, atol=0)
