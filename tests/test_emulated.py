"""On a device that is not the CPU: the CPU's tokens and gradients, nothing on the wrong device, few launches and reads.

tests/emulated.py says how the device comes about."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from emulated import apart, counted, emulated, move
from grpo.engine import rollout, speculation, static
from grpo.engine.head import completion_logp, exponential_, token_logits
from grpo.engine.lora import add_adapter
from grpo.engine.rollout import sample
from grpo.engine.speculation import Speculation
from grpo.group import make_packs
from grpo.objective import grpo_loss
from grpo.runtime.optim import backward, optimizer_step, packed_pass
from test_rollout import prompts, sampling, tokens
from test_speculation import longer, remembering
from tiny import tiny_groups, tiny_policy

CASES = [dict(), dict(temperature=0.0), dict(rows=4, read_every=3), dict(rows=2, read_every=5),
         dict(top_p=0.8, read_every=1)]


def with_adapter(policy):
    add_adapter(policy, 2, 4.0, "q_proj,o_proj,down_proj")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    return policy


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", range(len(CASES)))
@apart
def test_a_rollout_draws_the_cpus_tokens(case):
    plain = sample(tiny_policy(), prompts(), 3, sampling(**{**CASES[case], "read_every": 0}))
    with emulated() as device:
        drawn = sample(move(tiny_policy(), device), prompts(), 3, sampling(**CASES[case]))
    assert tokens(drawn) == tokens(plain)
    assert [group.finished for group in drawn] == [group.finished for group in plain]
    close(torch.cat([row for g in drawn for row in g.logps]), torch.cat([row for g in plain for row in g.logps]))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_static_shapes_draw_the_same_tokens_on_a_cpu_too(case):
    policy = tiny_policy()
    plain = sample(policy, prompts(), 3, sampling(**{**CASES[case], "read_every": 0}))
    drawn = sample(policy, prompts(), 3, sampling(**{"read_every": 4, **CASES[case]}))
    assert tokens(drawn) == tokens(plain)


def one_update(policy, device):
    """Two packs through the loss, one step of AdamW. Gradients before it, weights after it."""
    trained = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=1e-2, fused=True)
    for pack in make_packs(tiny_groups(), 60, device):
        with packed_pass(pack):
            scores = policy.score(pack.groups, 0.8)
            padded = torch.zeros(pack.mask.shape, device=device).masked_scatter(pack.mask, scores.logp)
            advantages = torch.arange(len(padded), device=device) - 1.0
            loss, _ = grpo_loss(padded, padded.detach() - 0.1, padded.detach() + 0.2, advantages, pack.mask, beta=0.04)
            backward(loss)
    gradients = {n: p.grad.cpu().clone() for n, p in trained if p.grad is not None}
    optimizer_step(policy, optimizer, loss.detach(), 1.0, 1e-2)
    return gradients, {n: p.detach().cpu().clone() for n, p in trained}


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "LoRA"])
@apart
def test_an_update_gives_the_cpus_gradients_and_weights(adapter):
    make = (lambda: with_adapter(tiny_policy())) if adapter else tiny_policy
    gradients, weights = one_update(make(), "cpu")
    with emulated() as device:
        found_gradients, found_weights = one_update(move(make(), device), device)
    assert gradients.keys() == found_gradients.keys() and len(gradients) > 5
    assert any("visual" in name for name in gradients) == (not adapter)
    for name, gradient in gradients.items():
        close(found_gradients[name], gradient)
        torch.testing.assert_close(found_weights[name], weights[name], rtol=1e-3, atol=1e-3)


@apart
def test_an_adapter_draws_the_cpus_tokens():
    plain = sample(with_adapter(tiny_policy()), prompts(3), 2, sampling())
    with emulated() as device:
        drawn = sample(move(with_adapter(tiny_policy()), device), prompts(3), 2, sampling())
    assert tokens(drawn) == tokens(plain)


@apart
def test_speculation_draws_the_cpus_tokens_in_fewer_steps():
    speculation.FIXED["cuda"] = (1000.0, 0.0)
    plain = sample(tiny_policy(), prompts(), 3, longer())
    guesses, steps = remembering(plain), []
    with emulated() as device:
        policy, step = move(tiny_policy(), device), static.Bucket.step
        static.Bucket.step = lambda bucket: steps.append(bucket.tokens) or step(bucket)
        drawn = sample(policy, prompts(), 3, longer(read_every=2), speculation=guesses)
    assert tokens(drawn) == tokens(plain) and max(steps) > 4
    counts = guesses.counts
    assert len(steps) < 12 < max(n for group in plain for n in group.lengths)
    assert counts["tokens"] == sum(n for g in plain for n in g.lengths) and counts["tokens"] > 3 * counts["steps"]
    assert 0 < counts["accepted"] == counts["tokens"] - counts["steps"] < counts["guessed"]


@apart
def test_the_vision_encoder_sees_what_it_sees_on_the_cpu():
    with torch.no_grad(), emulated() as device:
        plain, seen = (policy.encode_images(prompts(3)) for policy in (tiny_policy(), move(tiny_policy(), device)))
        assert [x is None for x in seen] == [x is None for x in plain] == [False, True, False]
        for one, other in zip(seen[::2], plain[::2]):
            assert one.device == device
            close(one.cpu(), other)


@apart
def test_an_operation_on_two_devices_raises():
    with emulated() as device:
        here, there = torch.ones(2), torch.ones(2, device=device)
        for operation in (lambda: here + there, lambda: there @ here, lambda: torch.cat([there, here])):
            with pytest.raises(RuntimeError, match="two devices"):
                operation()
        assert (there + torch.tensor(1.0)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@apart
def test_a_layer_of_a_decode_step_is_26_launches_and_a_step_is_not_read(kind):
    layers, steps = [], []
    with emulated() as device:
        policy, step = move(tiny_policy().to(getattr(torch, kind)), device), static.Bucket.step

        def stepped(bucket):
            with counted() as count:
                step(bucket)
            steps.append(count)

        def begin(*_):
            begin.before = len(counting.names)

        from emulated import COUNT as counting
        layer = policy.trunk_layers[1]
        layer.register_forward_pre_hook(begin)
        layer.register_forward_hook(lambda *_: layers.append(counting.names[begin.before:]))
        static.Bucket.step = stepped
        sample(policy, prompts(2), 3, sampling(read_every=4))
    layers = [names for names in layers if "baddbmm_" in names]
    assert len(layers) == len(steps) == 12 and {len(names) for names in layers} == {26}, layers[0]
    assert layers[0].count("rms_norm") == 2 and not [count.read_at for count in steps if count.reads]


def test_a_buckets_first_step_is_run_its_second_captured_and_replayed_from_then_on(monkeypatch):
    policy, drawn = tiny_policy(), sampling(max_tokens=80, end_tokens=(), read_every=4, rows=6)
    log, real = {}, static.run
    plain = sample(policy, prompts(3), 3, drawn)

    def capture(bucket, pool):
        assert pool == "pool" and log[bucket] == ["run"]
        log[bucket].append("captured")
        return SimpleNamespace(replay=lambda: (log[bucket].append("replayed"), bucket.step()))

    def run(bucket, pool):
        assert pool is None  # on a CPU
        before = len(log.setdefault(bucket, []))
        real(bucket, "pool")
        if len(log[bucket]) == before:
            log[bucket].append("run")

    monkeypatch.setattr(static, "capture", capture)
    monkeypatch.setattr(static, "run", run)
    assert tokens(sample(policy, prompts(3), 3, drawn)) == tokens(plain)
    assert len(log) == 4
    for steps in log.values():
        assert steps[:2] == ["run", "captured"] and set(steps[2:]) == {"replayed"} and len(steps) % 4 == 1


@pytest.mark.parametrize("read_every", [0, 4])
def test_a_rollouts_caches_are_gone_with_it(monkeypatch, read_every):
    caches, allocate = [], rollout.allocate

    def seen(*arguments):
        made, rows = allocate(*arguments)
        caches.extend(weakref.ref(tensor) for layer in made for tensor in (layer.prompt, layer.suffix))
        return made, rows

    monkeypatch.setattr(rollout, "allocate", seen)
    gc.disable()  # which would free what waits in a circle, some time later
    try:
        sample(tiny_policy(), prompts(2), 3, sampling(read_every=read_every))
        assert caches and not [one for one in caches if one() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("longest,pool,guesses", [(200, "pool", False), (300, "pool", True), (200, None, True)])
def test_where_steps_are_graphs_only_long_completions_are_guessed(monkeypatch, longest, pool, guesses):
    speculation = Speculation()
    for group in sample(tiny_policy(), prompts(2), 3, sampling(max_tokens=24, end_tokens=(), read_every=4)):
        speculation.remember(group.prompt.id, group.completions)
    monkeypatch.setattr(static, "run", lambda bucket, given: bucket.step())
    made = static.Static.__init__

    def init(self, rollout):
        made(self, rollout)
        self.pool = pool

    monkeypatch.setattr(static.Static, "__init__", init)
    ends = tuple(range(0, 190, 8))
    sample(tiny_policy(), prompts(2), 3, sampling(max_tokens=longest, end_tokens=ends, read_every=4),
           speculation=speculation)
    assert bool(speculation.counts["guessed"]) == guesses


@pytest.mark.parametrize("device,whole,switch,captured", [("cuda", True, True, True), ("cuda", False, True, False),
                                                          ("cuda", True, False, False), ("cpu", True, True, False)])
def test_steps_are_captured_on_a_gpu_that_holds_all_weights(monkeypatch, device, whole, switch, captured):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(static, "CAPTURE", switch)
    cache = SimpleNamespace(suffix=torch.zeros(2, 1, 1, 1, 8, 4))
    given = SimpleNamespace(policy=SimpleNamespace(device=torch.device(device)), sampling=sampling(read_every=4),
                            caches=[cache], whole=whole)
    assert static.Static(given).pool == ("pool" if captured else None)


@apart
def test_a_norm_keeps_to_torchs_own_kernels_and_an_exponential_is_one():
    with emulated() as device:
        policy = move(tiny_policy(), device)
        norm, x = policy.trunk_layers[0].input_layernorm, torch.randn(3, 32, device=device)
        assert "Norm" in type(tiny_policy().trunk_layers[0].input_layernorm(torch.randn(3, 32)).grad_fn).__name__
        assert "Norm" not in type(norm(x).grad_fn).__name__
        with counted() as count:
            found = exponential_(x.clone())
        assert count.launches == 2  # the copy's, too
        close(found.cpu(), x.cpu().exp())


@pytest.mark.parametrize("read_every", [0, 4])
def test_caches_of_static_shapes_come_in_multiples_of_16_bytes(monkeypatch, read_every):
    made, allocate = [], rollout.allocate
    monkeypatch.setattr(rollout, "allocate", lambda *given: made.append(allocate(*given)) or made[-1])
    sample(tiny_policy(), prompts(2), 3, sampling(max_tokens=21, read_every=read_every))
    (layer, *_), _ = made[0]
    lengths = [layer.prompt.shape[-2], layer.suffix.shape[-2]]
    assert lengths == [max(map(len, prompts(2))), 21] if not read_every else not any(one % 8 for one in lengths)


@apart
def test_the_heads_product_is_one_launch_however_few_the_rows_or_large_the_vocabulary():
    with emulated() as device:
        hidden, weight, targets = torch.randn(3, 8).to(device), torch.randn(3000, 8).to(device), torch.arange(3)
        with counted() as few:
            token_logits(hidden, weight, 0.8, [])
        with counted() as scored:
            completion_logp(hidden, weight, targets.to(device), 0.8, ())
    assert few.names == ["addmm"] and scored.names.count("addmm") == 1


@apart
def test_the_host_reads_once_in_k_steps_and_once_a_group_of_rows_that_enters():
    with emulated() as device:
        policy = move(tiny_policy(), device)
        for k, readings in ((1, 11), (4, 3), (11, 1)):
            text = [prompts()[1]]
            with counted() as count:
                sample(policy, text, 6, sampling(max_tokens=12, end_tokens=(), read_every=k))
            assert count.reads == 1 + readings, count.read_at  # 12 · 6 tokens


def test_a_decode_step_is_traced_whole_and_compiled_once_a_bucket(monkeypatch):
    policy, drawn = tiny_policy(), sampling(max_tokens=80, end_tokens=(), read_every=4, rows=6)
    plain, compiled, seen = sample(policy, prompts(3), 3, drawn), [], []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    step = torch.compile(static.Bucket.step, fullgraph=True, dynamic=False, backend=backend)

    def run(bucket, pool):
        seen.append(bucket)
        step(bucket)

    monkeypatch.setattr(static, "run", run)
    assert tokens(sample(policy, prompts(3), 3, drawn)) == tokens(plain)
    shapes = {(bucket.groups, bucket.read[0].shape[-2], bucket.tokens) for bucket in seen}
    assert len(set(map(id, seen))) == len(shapes) == len(compiled) == 4  # two groups, then one; 64 and 80 tokens


def test_a_decode_step_with_guesses_is_traced_whole_and_its_state_stays_where_it_is(monkeypatch):
    policy, drawn, speculation = tiny_policy(), sampling(max_tokens=24, end_tokens=(), read_every=4), Speculation()
    for group in sample(policy, prompts(2), 3, drawn):
        speculation.remember(group.prompt.id, group.completions)
    step, guessed, places = torch.compile(static.Bucket.step, fullgraph=True, dynamic=False, backend="eager"), [], {}

    def run(bucket, pool):
        step(bucket)
        guessed.append(bucket.tokens - 1)
        state = (bucket.window, bucket.uniform, bucket.start, bucket.first, bucket.limit, bucket.written, bucket.steps,
                 bucket.logps, bucket.lengths, *bucket.prompts, *bucket.read)
        places.setdefault(id(bucket), set()).add(tuple(tensor.data_ptr() for tensor in state))

    plain = sample(policy, prompts(2), 3, drawn)
    monkeypatch.setattr(static, "run", run)
    assert tokens(sample(policy, prompts(2), 3, drawn, speculation=speculation)) == tokens(plain)
    assert max(guessed) > 0 and all(len(one) == 1 for one in places.values())


def test_a_reading_every_minus_one_step_is_refused():
    with pytest.raises(ValueError, match="read_every is -1; at least 0"):
        sampling(read_every=-1)
