"""A group larger than one pass: its prompt once, its completions some at a time, the numbers of one pass.

Keys and values of a prompt depend on the prompt alone. Its pass keeps its graph; every further pass reads its keys,
values and last hidden states as leaves, in which the gradients of all these passes add up; at the end one backward goes
from there through the prompt (schedule-level prefix reuse, arXiv 2606.01143). Memory is that of the prompt's
activations and of one pass over completions, however many there are."""

from dataclasses import replace

import torch
from torch import Tensor

from grpo.engine.attention import Packed
from grpo.engine.policy import Policy, Scores
from grpo.group import Group, Pack, Prompt, row_mask, within


def split(packs: list[Pack], budget: int) -> list[Pack]:
    """A pack of one group beyond `budget` tokens becomes a chain of packs with as many of its completions as fit behind
    the prompt, at least one. Each holds its share of all that is known of the group."""
    parts = []
    for pack in packs:
        group, several = pack.groups[0], len(pack.groups) > 1 or len(pack.lengths) == 1
        if several or pack.packed_tokens <= budget:
            parts.append(pack)
            continue
        room = max(1, budget - len(group.prompt))
        for some in within(room, range(len(group.completions)), group.lengths.__getitem__):
            rows = slice(some[0], some[-1] + 1)
            known = {name: value[rows] for name, value in vars(group).items() if isinstance(value, (list, Tensor))}
            part = replace(group, whole=group, **known)
            parts.append(Pack([part], row_mask(part.lengths, pack.mask.device), chain=group))
    return parts


class SharedPrompts:
    """The prompts of a chain of packs. Under sharding every pass and the backward are collectives."""

    def __init__(self, policy: Policy, prompts: list[Prompt]):
        self.policy, self.prompts, self.tensors = policy, prompts, None

    def score(self, groups: list[Group], temperature: float) -> Scores:
        """As `policy.score`; the groups' prompts are among these, and are computed with the first of the chain."""
        if self.tensors is None:
            self.tensors = self.policy.call_inside(run_prompts, self.prompts)
            # float32: in bfloat16 the sum over passes would round away
            self.leaves = [t.detach().to(torch.promote_types(t.dtype, torch.float32)).requires_grad_(t.requires_grad)
                           for t in self.tensors]
        last, *kept = (leaf.to(tensor.dtype) for leaf, tensor in zip(self.leaves, self.tensors))
        step = 2 * len(self.prompts)  # from layer to layer
        keys_values = {id(prompt): (last[i], kept[2 * i :: step], kept[2 * i + 1 :: step])
                       for i, prompt in enumerate(self.prompts)}
        # within a function: sharding would take tensors among the arguments for the layers' own inputs
        return self.policy.call_inside(lambda policy: score_behind(policy, groups, keys_values, temperature))

    def backward(self) -> None:
        """Through the prompts, with what the chain's backward passes have left in the leaves."""
        tensors = [tensor for tensor in self.tensors if tensor.requires_grad]
        leaves = [leaf for leaf in self.leaves if leaf.requires_grad]
        if tensors:
            gradients = [torch.zeros_like(t) if leaf.grad is None else leaf.grad.to(t.dtype)
                         for t, leaf in zip(tensors, leaves)]
            torch.autograd.backward(tensors, gradients)


def run_prompts(policy: Policy, prompts: list[Prompt]) -> list[Tensor]:
    """(prompts, hidden) last hidden states; then layer by layer, prompt by prompt, keys and values (1, H_kv, P, d)."""
    cache = []
    layout = Packed([(len(prompt), []) for prompt in prompts], prompt_cache=cache)
    positions = torch.cat([prompt.positions for prompt in prompts], 1)[:, None].to(policy.device)
    hidden = policy.trunk(policy.embed(prompts)[None], positions, layout)[0]
    last = hidden[torch.tensor([len(prompt) for prompt in prompts], device=policy.device).cumsum(0) - 1]
    return [last + policy.zero(), *(tensor[None] for layer in cache for pair in layer for tensor in pair)]


def score_behind(policy: Policy, groups: list[Group], prompts: dict, temperature: float) -> Scores:
    """`Policy.forward` over completions alone. prompts: id → last hidden state, keys by layer, values by layer."""
    words, positions, places, lengths = [], [], [], []
    start = len(groups)  # behind the prompts' last hidden states
    for index, group in enumerate(groups):
        lengths.append([length - 1 for length in group.lengths])
        for completion, read in zip(group.completions, lengths[-1]):
            words.append(completion[:-1])
            positions.append(int(group.prompt.positions.max()) + 1 + torch.arange(read))
            places += [index, *range(start, start + read)]
            start += read
    # nothing to read: one token that nothing asks for, so that every rank goes through the layers
    if start == len(groups):
        words, lengths[-1] = [torch.zeros(1, dtype=torch.long)], lengths[-1] + [1]
        positions = [torch.zeros(1, dtype=torch.long)]
    layout = Behind([prompts[id(group.prompt)][1:] for group in groups], lengths)
    positions = torch.cat(positions).expand(3, 1, -1).to(policy.device)
    hidden = policy.trunk(policy.embed_tokens(torch.cat(words))[None], positions, layout)[0]
    hidden = torch.cat([torch.stack([prompts[id(group.prompt)][0] for group in groups]), hidden])
    return policy.scores_at(hidden, places, groups, temperature)


class Behind(Packed):
    """Completions end to end, each behind its prompt's keys and values, which a pass before has made.

    given: per group its prompt's keys and its values, layer by layer; lengths: per group those of its completions."""

    def __init__(self, given: list[tuple[list[Tensor], list[Tensor]]], lengths: list[list[int]]):
        super().__init__([])
        self.segments, self.given = [(0, own) for own in lengths], given

    def prompts(self, layer: int, own: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return [(keys[layer], values[layer]) for keys, values in self.given]
