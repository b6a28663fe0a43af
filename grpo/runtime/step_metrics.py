"""A step of Stage 2 in numbers: what was drawn, over all ranks, under TRL's names; and as one line for people."""

import math

import torch

from grpo.advantage import zero_variance_groups
from grpo.engine.speculation import Speculation
from grpo.group import Group, Pack, pad_rows
from grpo.runtime.dist import all_gather, all_reduce_max, all_reduce_sum


class Sums:
    """Sums of 0-dim tensors by name, over passes and then over ranks, each of which adds the same names."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()

    def over_ranks(self) -> dict[str, float]:
        return dict(zip(self.sums, all_reduce_sum(torch.stack(list(self.sums.values()))).tolist()))


def rollout_metrics(groups: list[Group], kept: int, too_long: int, names: list[str]) -> dict:
    """Rewards and lengths of all that was drawn. kept, too_long: this rank's groups that are learned from, its prompts
    left out since the run began; names: of the reward parts."""
    too_long, kept = (sum(all_gather([count])) for count in (too_long, kept))
    every = all_gather([(group.rewards.tolist(), group.counted.tolist(), group.parts.tolist(), group.lengths,
                         group.finished) for group in groups])
    if not every:
        return {"prompts": 0, "prompts_too_long": too_long, "groups_dropped": 0}
    rewards, counted, parts, lengths, finished = (torch.tensor(one, dtype=torch.float64) for one in zip(*every))
    counted = counted.bool()
    return {"prompts": len(every), "prompts_too_long": too_long, "groups_dropped": len(every) - kept,
            "reward": rewards[counted].mean().item(),
            "reward_std": torch.stack([row[known].std() for row, known in zip(rewards, counted)]).nanmean().item(),
            "frac_reward_zero_std": zero_variance_groups(rewards, counted).double().mean().item(),
            **{f"rewards/{name}/mean": mean for name, mean in zip(names, parts[counted].mean(0).tolist())},
            "completions/mean_length": lengths.mean().item(), "completions/max_length": lengths.max().item(),
            "completions/clipped_ratio": 1 - finished.mean().item()}


def sampling_metrics(packs: list[Pack]) -> dict:
    """Is the sampler the scorer? The first pass's log-probabilities against the sampler's own, over the trained
    tokens of all ranks: |log π_scorer − log π_sampler| and π_scorer / π_sampler, under TRL's names."""
    device, d = packs[0].mask.device, [torch.zeros(0)]
    for pack in packs:
        if pack.mask.any():
            drawn = pad_rows(torch.cat([row for group in pack.groups for row in group.logps]), pack.lengths)
            d.append((pack.old_logp.cpu() - drawn)[pack.mask.cpu()])
    d = torch.cat(d).double()
    sums = torch.stack([torch.tensor(len(d)).double(), d.abs().sum(), d.exp().sum()])
    count, far, ratio = all_reduce_sum(sums.to(device)).tolist()
    if not count:
        return {}
    ends = torch.stack([d.abs().max(), d.max(), -d.min()]) if len(d) else torch.full((3,), -torch.inf).double()
    most, high, low = all_reduce_max(ends.to(device)).tolist()
    return {"sampling/sampling_logp_difference/mean": far / count, "sampling/sampling_logp_difference/max": most,
            "sampling/importance_sampling_ratio/min": math.exp(-low),
            "sampling/importance_sampling_ratio/mean": ratio / count,
            "sampling/importance_sampling_ratio/max": math.exp(high)}


def speculation_metrics(speculation: Speculation | None) -> dict:
    """Of all ranks since the last call: tokens a decode step and row, share of guessed tokens that were drawn."""
    if not speculation:
        return {}
    counts = {name: sum(all_gather([count])) for name, count in speculation.counts.items()}
    speculation.counts = dict.fromkeys(speculation.counts, 0)
    return {"speculation/tokens_per_step": counts["tokens"] / max(1, counts["steps"]),
            "speculation/accepted": counts["accepted"] / max(1, counts["guessed"])}


def readable(line: dict, rollouts: int) -> str:
    """One rollout and its updates, or the mean of several, as one line for people."""
    if "loss" not in line:
        return (f"{line['step']}/{rollouts}  no group to learn from ({line['groups_dropped']} zero-variance ones "
                f"dropped, {line['prompts_too_long']} prompts too long so far)")
    parts = [f"{name.split('/')[1]} {value:.2f}" for name, value in line.items() if name.startswith("rewards/")]
    cut = f"  cut {line['completions/clipped_ratio']:.0%}" if line["completions/clipped_ratio"] else ""
    return (f"{line['step']}/{rollouts}  reward {line['reward']:.3f} ({'  '.join(parts)})  kl {line.get('kl', 0):.4f}  "
            f"tokens {line['completions/mean_length']:.0f}{cut}  zero-variance {line['frac_reward_zero_std']:.0%}  "
            f"{line['step_time']:.1f} s")


def outcome(rewards: list[float], valid: list[float], best: str) -> str:
    """What has become of the mean rewards of a run's rollouts, and of its validations; best: which was the best."""
    tenth = -(-len(rewards) // 10)
    first, last = (sum(part) / tenth for part in (rewards[:tenth], rewards[-tenth:]))
    learning = last > first or valid and max(valid) > valid[0] or len(rewards) < 10
    return f"reward {first:.2f} → {last:.2f} (first and last tenth){', ' if best else ''}{best}" + (
        "" if learning else ": not learning, see docs/training-guide.md")


SYMPTOMS = {  # its name in docs/training-guide.md: whether a rollout's line shows it
    "All groups have zero variance": lambda line: line.get("frac_reward_zero_std", 0) == 1,
    "Completions hit the limit": lambda line: line.get("completions/clipped_ratio", 0) > 0.5,
    "KL explodes": lambda line: line.get("kl", 0) > 1}
IN_A_ROW = 3  # rollouts, before it is said


class Symptoms:
    """Points to the training guide, once in a run for each symptom that several rollouts in a row show."""

    def __init__(self):
        self.in_a_row = dict.fromkeys(SYMPTOMS, 0)  # of those that have not been said

    def found(self, line: dict) -> list[str]:
        self.in_a_row = {name: (count + 1) * bool(SYMPTOMS[name](line)) for name, count in self.in_a_row.items()}
        due = [name for name, count in self.in_a_row.items() if count == IN_A_ROW]
        for name in due:
            del self.in_a_row[name]
        return [f"{name} ({IN_A_ROW} rollouts in a row): see docs/training-guide.md" for name in due]
