"""The fast paths that `benchmarks.check` holds against their plain forms, on a tiny random Qwen2.5-VL.

The plain form of the network is stock transformers with eager attention, one prompt and one completion a forward, all
logits at once, float32. Heads are 128 wide as in the published models, so that the same attention kernels are chosen.

Log-probabilities differ by the largest |Δ| in nats. Gradients differ by the largest ‖Δ‖ of a parameter's, as a share of
its own norm, or of a hundredth of the whole gradient's where it has almost none (a key's bias).
"""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
from torch.distributed.tensor import DTensor
from transformers import Qwen2_5_VLForConditionalGeneration as Stock

from benchmarks import shapes
from benchmarks.two_images import Sample
from data.toy.model import model_config, token_ids, write_settings, write_tokenizer, write_weights
from grpo.advantage import group_advantages
from grpo.engine.attention import Packed
from grpo.engine.encode import Encoder
from grpo.engine.head import completion_logp
from grpo.engine.lora import adapted, add_adapter, adapter_off
from grpo.engine.policy import Policy
from grpo.engine.rollout import Sampling, sample
from grpo.engine.speculation import Speculation
from grpo.engine.split_group import split
from grpo.engine.static import LONG
from grpo.engine.weights import load_policy
from grpo.group import Group, Pack, row_mask
from grpo.objective import grpo_loss
from grpo.runtime.dist import world_size
from grpo.runtime.export import export
from grpo.runtime.fsdp import shard
from grpo.runtime.optim import backward, passes, set_gradient_checkpointing
from grpo.runtime.settings import LORA_TARGETS

TINY = dict(hidden=512, layers=2, heads=4, key_value_heads=2, intermediate=512, vision_hidden=64, vision_depth=2,
            tied=False, initial_std=0.06)  # wide enough that distribution and attention are far from uniform
VOCABULARY, SIDE, TEMPERATURE = 2048, 140, 0.8  # 140 pixels: more than one window of the vision encoder
LENGTHS = ((24, 1, 17, 9), (5, 30, 2, 11))
ROUNDING = "float32, sums in another order"
VALUES, GRADIENTS = 1e-4, 1e-3  # a CPU's rounding gives 7e-6 and 3e-6, a wrong path 0.01 and far more


@dataclass
class Found:
    """One measured difference. `where` names the parameter or token that differs most."""

    what: str
    differs: float
    allowed: float
    unit: str
    why: str
    where: str = ""
    off: str = ""  # what turns off this alone

    @property
    def fits(self) -> bool:
        return self.differs <= self.allowed  # not so for NaN


def write_checked(folder: Path) -> Path:
    """The tiny checkpoint."""
    folder.mkdir()
    write_tokenizer(folder, [f" {shapes.WORD}"] * 50, vocabulary=300)
    write_settings(folder, 28 * 28, 1280 * 28 * 28)
    config = model_config(token_ids(folder), **TINY) | {"vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_weights(folder, seed=0)
    return folder


@dataclass
class Subject:
    """The tiny model on the device: what is fast, what is plain, and groups to try both on."""

    place: Path  # a folder for what is written; the checkpoint is its `model`
    device: torch.device
    weights: dict[int, torch.Tensor] = field(default_factory=dict)  # of each completion's tokens in the loss, by its id

    def __post_init__(self):
        self.folder = self.place / "model"
        self.encoder = Encoder(str(self.folder))
        random = torch.Generator().manual_seed(1)
        self.groups = []
        for number, lengths in enumerate(LENGTHS):
            made = Sample(f"check/{number}", number, SIDE, f" {shapes.WORD}" * (3 + 4 * number))
            prompt = self.encoder.encode(shapes.images(number, SIDE), made.text, made, made.id)
            completions = [torch.randint(0, 256, (length,), generator=random) for length in lengths]
            self.weights |= {id(one): torch.randn(len(one), generator=random) for one in completions}
            self.groups.append(Group(prompt, completions))

    def policy(self) -> Policy:
        """Float32, every number of it trains."""
        policy = load_policy(str(self.folder)).to(self.device)
        policy.vocabulary = VOCABULARY
        return policy

    def stock(self, folder: Path | None = None) -> Stock:
        model = Stock.from_pretrained(str(folder or self.folder), dtype=torch.float32, attn_implementation="eager")
        return model.eval().to(self.device)

    def weight(self, groups: list[Group]) -> torch.Tensor:
        """What each token's log-probability counts in the loss, end to end."""
        return torch.cat([self.weights[id(one)] for group in groups for one in group.completions]).to(self.device)

    def gradient(self, policy: Policy, logp: torch.Tensor, groups: list[Group]) -> dict[str, torch.Tensor]:
        backward((logp * self.weight(groups)).sum() / world_size())  # every rank has the same groups
        return gradients(policy.model)

    def packed(self, policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Log-probabilities and gradients of one packed pass."""
        logp = policy.score(self.groups, TEMPERATURE).logp
        return logp.detach(), self.gradient(policy, logp, self.groups)

    def plain(self, model: Stock, backwards: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The same by stock forwards, one by one."""
        rows = []
        for group in self.groups:
            for completion in group.completions:
                ids = torch.cat([group.prompt.tokens, completion])[None].to(self.device)
                out = model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    use_cache=False,
                    mm_token_type_ids=(ids == model.config.image_token_id).int(),
                    pixel_values=group.prompt.pixels.to(self.device),
                    image_grid_thw=group.prompt.grids.to(self.device),
                )
                logits = out.logits[0, len(group.prompt) - 1 : -1].float() / TEMPERATURE
                banned = torch.tensor([model.config.image_token_id, model.config.video_token_id], device=self.device)
                chosen = logits.index_fill(-1, banned, -torch.inf).log_softmax(-1)
                rows.append(chosen.gather(-1, completion.to(self.device)[:, None])[:, 0])
        logp = torch.cat(rows)
        if backwards:
            (logp * self.weight(self.groups)).sum().backward()
        return logp.detach(), gradients(model)


def leaf(tensor: torch.Tensor, device="cpu", dtype=torch.float32) -> torch.Tensor:
    """A copy of its own with a gradient of its own."""
    return tensor.detach().to(device, dtype, copy=True).requires_grad_()


def gradients(model) -> dict[str, torch.Tensor]:
    """By name; they are taken from the parameters."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad, parameter.grad = parameter.grad, None
            found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).float()
    return found


def needs(tried: bool, what: str) -> None:
    """Nothing is green that was not tried."""
    if not tried:
        raise RuntimeError(f"{what}: the path was not tried")


def values_differ(fast: torch.Tensor, plain: torch.Tensor, what: str = "values") -> Found:
    far = (fast.float() - plain.float()).abs()
    return Found(what, far.max().item(), VALUES, "nats", ROUNDING, f"token {int(far.argmax())}")


def gradients_differ(fast: dict, plain: dict, what: str = "gradients", allowed: float = GRADIENTS) -> Found:
    """Of the parameters that both have; one that only the plain form has is all wrong."""
    whole = math.sqrt(sum(float(grad.square().sum()) for grad in plain.values()))
    far = {
        name: float((fast[name] - grad).norm()) / max(float(grad.norm()), whole / 100) if name in fast else math.inf
        for name, grad in plain.items()
    }
    worst = max(far, key=lambda name: math.inf if math.isnan(far[name]) else far[name])
    return Found(what, far[worst], allowed, "of the norm", ROUNDING, worst)


# ── the paths ────────────────────────────────────────────────────────────────────────────────────────────────────


def packed_pass(s: Subject) -> list[Found]:
    (logp, grads), (plain_logp, plain_grads) = s.packed(s.policy()), s.plain(s.stock())
    return [values_differ(logp, plain_logp), gradients_differ(grads, plain_grads)]


def attention_behind(s: Subject) -> list[Found]:
    """The layout's attention alone, grouped heads and ragged completions, against a softmax written out in float64."""
    random = torch.Generator().manual_seed(2)
    (prompt, lengths), heads, pairs, size = (37, [11, 1, 20]), 4, 2, 128
    rows = prompt + sum(lengths)
    query, key, value, weight = (
        torch.randn(1, count, rows, size, generator=random) for count in (heads, pairs, pairs, heads)
    )
    seen = torch.zeros(rows, rows, dtype=torch.bool)
    start = prompt
    seen[:prompt, :prompt] = torch.ones(prompt, prompt).tril().bool()
    for length in lengths:
        seen[start : start + length, :prompt] = True
        seen[start : start + length, start : start + length] = torch.ones(length, length).tril().bool()
        start += length
    fast = [leaf(tensor, s.device) for tensor in (query, key, value)]
    out = Packed([(prompt, lengths)]).attend(0, *fast, size**-0.5).transpose(1, 2)
    (out * weight.to(s.device)).sum().backward()
    plain = [leaf(tensor, dtype=torch.float64) for tensor in (query, key, value)]
    q, k, v = plain[0], *(tensor.repeat_interleave(heads // pairs, 1) for tensor in plain[1:])
    scores = (q @ k.transpose(-1, -2) * size**-0.5).masked_fill(~seen, -torch.inf)
    expected = scores.softmax(-1) @ v
    (expected * weight).sum().backward()
    named = lambda tensors: {
        name: tensor.grad.cpu().double() for name, tensor in zip(("query", "key", "value"), tensors)
    }
    far = (out.detach().cpu().double() - expected.detach()).abs().max().item()
    return [Found("values", far, 1e-4, "of about 1", ROUNDING), gradients_differ(named(fast), named(plain))]


def head(s: Subject) -> list[Found]:
    """Log-probabilities in tiles against log_softmax of all logits in float64."""
    random = torch.Generator().manual_seed(3)
    hidden, table = torch.randn(70, 256, generator=random), torch.randn(VOCABULARY, 256, generator=random) / 8
    targets, weight = torch.randint(0, 1500, (70,), generator=random), torch.randn(70, generator=random)
    fast = [leaf(tensor, s.device) for tensor in (hidden, table)]
    found = {}
    for name, tile in (("this device's", None), ("small", (16, 300))):
        for tensor in fast:
            tensor.grad = None
        logp, entropy = completion_logp(*fast, targets.to(s.device), TEMPERATURE, (7, 1999), tile, vocabulary=2000)
        (logp * weight.to(s.device)).sum().backward()
        found[name] = logp.detach(), {"hidden": fast[0].grad.cpu().double(), "weight": fast[1].grad.cpu().double()}
    plain = [leaf(tensor, dtype=torch.float64) for tensor in (hidden, table)]
    logits = (plain[0] @ plain[1][:2000].T / TEMPERATURE).index_fill(1, torch.tensor([7, 1999]), -torch.inf)
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected * weight).sum().backward()
    plain_grads = {"hidden": plain[0].grad, "weight": plain[1].grad}
    return [
        one
        for name, (logp, grads) in found.items()
        for one in (
            values_differ(logp.cpu(), expected.detach(), f"values, {name} tiles"),
            gradients_differ(grads, plain_grads, f"gradients, {name} tiles"),
        )
    ]


def lean_modules(s: Subject) -> list[Found]:
    """Norms and MLPs that keep less for the backward, against those of transformers."""
    ours, stock = s.policy().trunk_layers[0], s.stock().get_decoder().layers[0]
    random, found = torch.Generator().manual_seed(4), []
    x, weight = (torch.randn(1, 33, TINY["hidden"], generator=random).to(s.device) for _ in range(2))
    for name in ("input_layernorm", "mlp"):
        results = []
        for layer in (ours, stock):
            module, given = getattr(layer, name), x.clone().requires_grad_()
            out = module(given)
            (out * weight).sum().backward()
            results.append((out.detach(), {**gradients(module), "input": given.grad}))
        (out, grads), (plain, plain_grads) = results
        far = float((out - plain).norm() / plain.norm())
        kind = {"mlp": "MLP"}.get(name, "norm")
        found += [
            Found(f"{kind}: values", far, 1e-5, "of the norm", ROUNDING),
            gradients_differ(grads, plain_grads, f"{kind}: gradients"),
        ]
    return found


def drawn(s: Subject, policy: Policy, speculation: Speculation | None = None, read_every: int = 0) -> list[Group]:
    """12 completions of 40 tokens in the mean, 8 at a time, so that rows end, leave and enter. With a lower limit than
    LONG a GPU would not guess."""
    prompts = [group.prompt for group in s.groups]
    ends = tuple(range(0, VOCABULARY, 40))
    sampling = Sampling(LONG, ends, TEMPERATURE, rows=8, seed="check", read_every=read_every)
    return sample(policy, prompts, 6, sampling, speculation=speculation)


def decoding(s: Subject) -> list[Found]:
    """As this device decodes, and with static shapes read once in three steps, as an accelerator does."""
    policy, found = s.policy(), []
    for name, read_every in (("values", 0), ("values, static shapes", 3)):
        groups = drawn(s, policy, read_every=read_every)
        with torch.no_grad():
            scored = policy.score(groups, TEMPERATURE).logp
        own = torch.cat([row for group in groups for row in group.logps]).to(s.device)
        found.append(values_differ(own, scored, name))
    return found


def speculating(s: Subject) -> list[Found]:
    """Guesses that are right up to a place and wrong behind it, against none."""
    policy, speculation = s.policy(), Speculation()
    plain = drawn(s, policy)
    for group in plain:
        before = [torch.cat([one[: 2 * len(one) // 3], one.flip(0)]) for one in group.completions]
        speculation.remember(group.prompt.id, before)
    guessed = drawn(s, policy, speculation)
    other = sum(
        not torch.equal(a, b) for one, two in zip(guessed, plain) for a, b in zip(one.completions, two.completions)
    )
    found = [Found("other completions", float(other), 1.0, "of 12", "a drawn number within rounding of a token's edge")]
    counts = speculation.counts
    with torch.no_grad():
        scored = policy.score(guessed, TEMPERATURE).logp
    needs(
        other or 0 < counts["accepted"] < counts["guessed"],
        f"{counts['accepted']} of {counts['guessed']} guesses were right",
    )
    return [*found, values_differ(torch.cat([row for group in guessed for row in group.logps]).to(s.device), scored)]


def lora(s: Subject) -> list[Found]:
    """An adapter: switched off; beside the weights; merged into them by hand; merged by an export."""
    base, policy = s.policy(), load_policy(str(s.folder))
    policy.vocabulary = VOCABULARY
    add_adapter(policy, 8, 16.0, LORA_TARGETS)
    random = torch.Generator().manual_seed(5)
    layers = adapted(policy.model)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=random) / 50)
    policy.to(s.device)
    merged = s.policy()
    with torch.no_grad():
        for name, layer in layers.items():
            merged.model.get_submodule(name).weight += layer.scale * layer.lora_B @ layer.lora_A
        bare = base.score(s.groups, TEMPERATURE).logp
        with adapter_off(policy):
            off = policy.score(s.groups, TEMPERATURE).logp
    (logp, grads), (merged_logp, merged_grads) = s.packed(policy), s.packed(merged)
    expected = {}
    for name, layer in layers.items():  # y = (W + s B A) x: the chain rule from the merged matrix
        dW = merged_grads[f"{name}.weight"]
        expected[f"{name}.lora_A"] = layer.scale * layer.lora_B.detach().T @ dW
        expected[f"{name}.lora_B"] = layer.scale * dW @ layer.lora_A.detach().T
    place = s.place / "merged"
    export(policy, str(s.folder), place)
    exported, _ = s.plain(s.stock(place), backwards=False)
    needs(float((merged_logp - bare).abs().max()) > 0.01, "an adapter that changes nothing")
    return [
        values_differ(off, bare, "off: values"),
        values_differ(logp, merged_logp, "by hand: values"),
        gradients_differ(grads, expected, "by hand: gradients"),
        values_differ(exported, merged_logp, "exported: values"),
    ]


def in_passes(s: Subject, policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """As `Subject.packed`, each group in several passes behind one of its prompt."""
    rows, packs = [], split(
        [Pack([group], row_mask(group.lengths, s.device)) for group in s.groups], len(s.groups[0].prompt) + 30
    )
    for pack, score in passes(policy, packs, TEMPERATURE):
        scores = score()
        backward((scores.logp * s.weight(pack.groups)).sum() / world_size())
        rows.append(scores.logp.detach())
    needs(len(packs) > len(s.groups), "groups that were not split")
    return torch.cat(rows), gradients(policy.model)


def split_passes(s: Subject) -> list[Found]:
    """A group of several passes behind one pass of its prompt."""
    (logp, grads), (again_logp, again) = s.packed(s.policy()), in_passes(s, s.policy())
    return [values_differ(again_logp, logp), gradients_differ(again, grads)]


def checkpointing(s: Subject) -> list[Found]:
    logp, grads = s.packed(s.policy())
    policy = s.policy()
    set_gradient_checkpointing(policy, True)
    again_logp, again = s.packed(policy)
    return [values_differ(again_logp, logp), gradients_differ(again, grads)]


def bfloat16(s: Subject) -> list[Found]:
    """As a run computes: float32 masters. Against float32, and allowed twice what stock transformers in bfloat16 is
    away from it."""
    logp, grads = s.plain(s.stock())
    stock_logp, stock_grads = s.plain(s.stock().bfloat16())
    rms = lambda a: float((a.float() - logp).square().mean().sqrt())
    why, found = "twice stock transformers' own in bfloat16", []
    for name, freezes, score in (("", True, s.packed), (", vision trains", False, s.packed),
                                 (", several passes", True, lambda policy: in_passes(s, policy))):
        policy = s.policy()
        if freezes:
            policy.freeze_vision()
        low_logp, low = score(shard(policy, torch.bfloat16, s.device))
        trained = {name: grads[name] for name in grads if not freezes or "visual" not in name}
        whole = sum(float(g.square().sum()) for g in trained.values())
        square = lambda a, n: float((a[n] - trained[n]).square().sum()) if n in a else math.inf
        apart = lambda a: math.sqrt(sum(square(a, n) for n in trained) / whole)
        found += [Found(f"values, rms{name}", rms(low_logp), 2 * rms(stock_logp) + 1e-3, "nats", why),
                  Found(f"gradients{name}", apart(low), 2 * apart(stock_grads) + 1e-3, "of the norm", why)]
    return found


def sharded(s: Subject) -> list[Found]:
    """Weights over all ranks, against this rank alone."""
    policy = shard(s.policy(), torch.float32, s.device)
    (logp, grads), (plain_logp, plain_grads) = s.packed(policy), s.packed(s.policy())
    return [values_differ(logp, plain_logp), gradients_differ(grads, plain_grads)]


def objective(s: Subject) -> list[Found]:
    """grpo_loss and the advantages on the device, against the papers' sums over tokens one by one in float64."""
    random = torch.Generator().manual_seed(6)
    lengths = [5, 9, 1, 7, 3, 8, 2, 6]
    mask = row_mask(lengths)
    given = -torch.rand(8, 9, generator=random) * 4
    old, ref = (given + torch.randn(8, 9, generator=random) / 3 for _ in range(2))
    rewards = torch.rand(2, 4, generator=random, dtype=torch.float64)
    advantages = [(r - statistics.mean(row)) / (statistics.stdev(row) + 1e-4) for row in rewards.tolist() for r in row]
    fast = leaf(given, s.device)
    ours = group_advantages(rewards).flatten()
    loss, _ = grpo_loss(
        fast, old.to(s.device), ref.to(s.device), ours.float().to(s.device), mask.to(s.device), beta=0.04
    )
    loss.backward()
    plain = leaf(given, dtype=torch.float64)
    rows = []
    for i, (length, advantage) in enumerate(zip(lengths, advantages)):
        terms = []
        for t in range(length):
            ratio = (plain[i, t] - old[i, t].double()).exp()
            far = (ratio.item() > 1.2 and advantage > 0) or (ratio.item() < 0.8 and advantage < 0)
            gap = ref[i, t].double() - plain[i, t]
            terms.append(
                (min(max(ratio.item(), 0.8), 1.2) if far else ratio) * advantage - 0.04 * (gap.exp() - gap - 1)
            )
        rows.append(sum(terms) / length)
    expected = -sum(rows) / len(rows)
    expected.backward()
    far = max(abs(a - b) for a, b in zip(ours.tolist(), advantages))
    return [
        Found("advantages", far, 1e-9, "of about 1", "float64"),
        Found("loss", abs(loss.item() - expected.item()), 1e-5, "of about 1", ROUNDING),
        gradients_differ({"logp": fast.grad.cpu().double()}, {"logp": plain.grad}, allowed=1e-4),
    ]


@dataclass(frozen=True)
class FastPath:
    """A fast path, its plain form, the line that turns it off ("": none does) and the function that tries it."""

    name: str
    against: str
    off: str
    tried: Callable[[Subject], list[Found]]


NONE = ""
PATHS = (
    FastPath("packed pass", "stock transformers, one by one", NONE, packed_pass),
    FastPath("attention in a pack", "a softmax written out", NONE, attention_behind),
    FastPath("head in tiles", "log_softmax of all logits", NONE, head),
    FastPath("lean norm and MLP", "transformers' own", NONE, lean_modules),
    FastPath("decoding, one prefill", "the packed pass", NONE, decoding),
    FastPath("speculation", "without guesses", "--speculate off", speculating),
    FastPath("LoRA", "off; merged by hand; exported", "--lora_rank 0", lora),
    FastPath("bfloat16", "float32", "--dtype float32", bfloat16),
    FastPath("group in several passes", "one pass", "--tokens_per_pass of a whole group and more", split_passes),
    FastPath("gradient checkpointing", "kept activations", "--gradient_checkpointing False", checkpointing),
    FastPath("objective", "sums over tokens", NONE, objective),
)
SHARDED = FastPath("sharded weights", "one rank alone", "one process instead of torchrun", sharded)
