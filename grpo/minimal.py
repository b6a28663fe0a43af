"""The whole of GRPO on one screen: one process, no resume, no report, no sharding.

    python -m grpo.minimal --model runs/demo/stage_1/model --data runs/demo/world/MORE --task more --rollouts 20

It is the real one: from the same checkpoint, settings and seed its weights are those of grpo.train to the bit
(tests/test_minimal.py), which adds what long runs on many GPUs need and nothing to the algorithm."""

from dataclasses import dataclass
from pathlib import Path

from grpo.runtime.settings import read_settings, refuse_early, required, run_program, setting


@dataclass
class Settings:
    """GRPO in one file. The defaults are MORE-R1's."""

    model: str = required("checkpoint folder or hub name: where the policy starts, and the reference", path="model")
    data: str = required("folder of the task's dataset, or its file", path="data")
    output: str = setting("", "folder for the trained model; empty: it is not kept")
    task: str = setting("more", "a task here (more, jmere) or a module of yours")
    rollouts: int = setting(20, "rollouts in all, of a shuffled training split")
    prompts_per_rollout: int = setting(16, "prompts of one rollout")
    group_size: int = setting(8, "G, completions a prompt")
    updates: int = setting(2, "μ, updates a rollout")
    learning_rate: float = setting(1e-6, "AdamW's, constant")
    beta: float = setting(0.001, "weight of the KL to the reference")
    clip: float = setting(0.2, "ε")
    temperature: float = setting(0.8, "of the rollouts and of the scored distribution")
    max_completion_tokens: int = setting(1024, "longest completion, end token included")
    tokens_per_pass: int = setting(16384, "packed tokens of one forward and backward: changes memory use only")
    max_pixels: int = setting(1280 * 28 * 28, "largest area of an image in pixels")
    seed: int = setting(0, "random seed of data order and sampling")


refuse_early(Settings, __name__)  # before torch is imported: --help answers at once

import torch  # noqa: E402

from data.curriculum import epoch_batches  # noqa: E402
from data.task import load_samples, resolve_task  # noqa: E402
from grpo.advantage import group_advantages  # noqa: E402
from grpo.engine.encode import Encoder  # noqa: E402
from grpo.engine.files import reasoning_of  # noqa: E402
from grpo.engine.policy import Policy  # noqa: E402
from grpo.engine.rollout import Sampling, sample  # noqa: E402
from grpo.engine.weights import load_policy  # noqa: E402
from grpo.group import Pack, make_packs, pad_rows  # noqa: E402
from grpo.objective import grpo_loss  # noqa: E402
from grpo.runtime.export import export  # noqa: E402
from grpo.runtime.schedule import earlier_appearances  # noqa: E402


def train(s: Settings) -> Policy:
    task, encoder = resolve_task(s.task), Encoder(s.model, s.max_pixels)
    s.reasoning = reasoning_of(s.model)
    samples = load_samples(task, s, "train", encoder.seen_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy, reference = (load_policy(s.model).to(device) for _ in range(2))
    policy.freeze_vision()
    optimizer = make_optimizer(policy, s)
    for number, batch in zip(range(s.rollouts), batches(samples, task, s)):
        # encode: each image goes through the vision encoder once, for rollout, reference and all updates
        prompts = [encoder.encode(*task.data.build_prompt(one, reasoning=s.reasoning), one, one.id) for one in batch]
        policy.keep_image_features(prompts)

        # sample: G continuations of every prompt, behind one prefill
        noise = f"{s.seed}/{number}"
        sampling = Sampling(s.max_completion_tokens, encoder.end_tokens, s.temperature, seed=noise,
                            earlier=tuple(earlier_appearances(batch))).check_training()
        groups = sample(policy, prompts, s.group_size, sampling)

        # reward, and from it the advantage: how much better than the others of its group
        reward, weights = task.rewards.reward, task.rewards.WEIGHTS
        rewards = torch.tensor([[
            sum(weights[name] * part for name, part in reward(encoder.decode(text), group.prompt.sample).items())
            for text in group.completions] for group in groups], dtype=torch.float64)  # (groups, G)
        advantages = group_advantages(rewards).to(device, torch.float32)

        # score: all G completions behind one copy of the prompt, first by the reference, then by the policy, μ times
        packs = make_packs(groups, s.tokens_per_pass, device)
        for pack, rows in zip(packs, advantages.split([len(pack.groups) for pack in packs])):
            pack.advantages = rows.flatten()
            with torch.no_grad():
                pack.ref_logp = score(reference, pack, s.temperature)
        for _ in range(s.updates):
            loss = update(policy, optimizer, packs, s)
        print(f"{number + 1}/{s.rollouts}  reward {rewards.mean():.3f}  loss {loss:.5f}", flush=True)
    if s.output:
        export(policy, s.model, Path(s.output), training={"reasoning": s.reasoning})
    return policy


def update(policy: Policy, optimizer: torch.optim.Optimizer, packs: list[Pack], s: Settings) -> float:
    """One of a rollout's μ updates: the gradients of all packs add up, then one step."""
    total, completions = 0.0, sum(len(pack.mask) for pack in packs)
    for pack in packs:
        logp = score(policy, pack, s.temperature)
        if pack.old_logp is None:  # nothing has been learned from this rollout yet: this is the policy that drew
            pack.old_logp = logp.detach()
        loss, _ = grpo_loss(logp, pack.old_logp, pack.ref_logp, pack.advantages, pack.mask, clip_low=s.clip,
                            clip_high=s.clip, beta=s.beta, denominator=completions)
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def score(policy: Policy, pack: Pack, temperature: float) -> torch.Tensor:
    """(N, L) log-probabilities of the pack's completions, one packed pass."""
    scores = policy.score(pack.groups, temperature)
    return pad_rows(scores.logp, scores.lengths)


def make_optimizer(policy: Policy, s: Settings) -> torch.optim.AdamW:
    """Weight decay on matrices alone."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(0.9, 0.95), fused=True)


def batches(samples: list, task, s: Settings):
    """Shuffled epochs without end, `prompts_per_rollout` samples at a time."""
    epoch = 0
    while True:
        yield from epoch_batches(samples, [], epoch=epoch, batch_size=s.prompts_per_rollout, none_share=0.0,
                                 is_none=task.data.is_none, mixing="raw", seed=s.seed).batches
        epoch += 1


if __name__ == "__main__":
    run_program(lambda: train(read_settings(Settings)))
