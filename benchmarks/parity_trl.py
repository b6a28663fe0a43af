"""Our objective beside TRL's own GRPOTrainer, live: the largest differences in advantages, loss, gradient.

    python -m benchmarks.parity_trl

TRL's trainer is a real one, around a model of a few hundred weights.  Two of its methods are replaced: the
one that generates, to return completions of drawn lengths, and the one that runs the model, to return drawn
log-probabilities.  All else is TRL's: rewards, weights, advantages, masks, token counts, loss, backward.
"""

import argparse
import math
import sys
import tempfile
import warnings

import torch

from benchmarks.record import without_vision_operators
from grpo.advantage import combine_rewards, group_advantages
from grpo.objective import grpo_loss, mean_statistics

without_vision_operators()
VERSION = "1.16"
INSTALL = f"TRL is missing; install it beside torch: pip install 'trl=={VERSION}.*'"
GROUPS, G, LIMIT, BETA = 4, 8, 24, 0.04  # LIMIT: the most tokens a completion may have
TOLERANCE = 1e-6

# name, TRL's settings, ours; both clip to 0.2 below and 0.28 above unless they say otherwise.
OBJECTIVES = [
    ("grpo", dict(loss_type="grpo"), dict(aggregate="sequence")),
    ("bnpo", dict(loss_type="bnpo"), dict(aggregate="token")),
    ("dr_grpo", dict(loss_type="dr_grpo"), dict(aggregate="constant", length=LIMIT)),
    ("dapo", dict(loss_type="dapo"), dict(aggregate="token")),
    ("cispo", dict(loss_type="cispo", epsilon_high=1.3),
     dict(aggregate="token", surrogate="cispo", clip_low=None, clip_high=0.3)),
    ("grpo, sequence-level", dict(loss_type="grpo", importance_sampling_level="sequence"),
     dict(level="sequence")),
    ("luspo", dict(loss_type="luspo", importance_sampling_level="sequence"),
     dict(level="sequence", aggregate="constant", length=1)),
    ("sapo", dict(loss_type="sapo"), dict(surrogate="sapo")),
    ("vespo", dict(loss_type="vespo"), dict(surrogate="vespo", aggregate="token")),
]
ADVANTAGES = [
    ("group", dict(scale_rewards="group"), lambda parts, weights: sum_then(parts, weights, "group")),
    ("batch", dict(scale_rewards="batch"), lambda parts, weights: sum_then(parts, weights, "batch")),
    ("none", dict(scale_rewards="none"), lambda parts, weights: sum_then(parts, weights, "none")),
    ("normalise, then sum", dict(multi_objective_aggregation="normalize_then_sum"),
     lambda parts, weights: group_advantages(combine_rewards(parts, weights, "normalised"), "centred-batch")),
]
NOTES = """\
Differences of definition:
  bnpo      divides by the tokens of the micro-batch, dapo by those of the whole batch.  Ours is the latter;
            where one call sees the whole batch, as here, they are the same.
  cispo     TRL's epsilon_high is the bound of the weight itself; ours, as the paper's, its distance from 1.
  kl        TRL weights the KL by the ratio unless told otherwise (use_bias_correction_kl): kl_weighted=True
            here.  Its `kl` statistic is then the weighted one, ours always the bare estimate: not compared.
  clip      sequence-level, TRL's statistics are means over completions, ours over tokens: not compared.
  flat      a group of equal rewards is exactly zero here; TRL divides what rounding leaves (the last line).
  sums      luspo's loss is a sum over tokens and not a mean, so it is larger and so is its rounding.
No counterpart: delta (a second bound), entropy quantile and bonus, off-policy sequence masking."""


def sum_then(parts, weights, scale):
    return group_advantages(combine_rewards(parts, weights), scale)


def trl_trainer(rewards, weights, **settings):
    """A GRPOTrainer whose reward functions return the columns of `rewards`, (N, K)."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "a": 2}, unk_token="a")),
        pad_token="<pad>", eos_token="<end>",
    )
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=3, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    ))
    arguments = dict(
        output_dir=tempfile.gettempdir(), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=len(rewards), num_generations=G,
        max_completion_length=LIMIT, epsilon=0.2, epsilon_high=0.28, reward_weights=weights.tolist(),
        use_bias_correction_kl=False,
    )
    columns = [lambda prompts, column=column, **_: column.tolist() for column in rewards.T]
    for k, function in enumerate(columns):
        function.__name__ = f"part_{k}"
    return GRPOTrainer(
        model, columns, args=GRPOConfig(**arguments | settings), processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * GROUPS),
    )


def draw(seed):
    """One batch: logp, old_logp, ref_logp (N, L), lengths (N,), reward parts (N, K), their weights (K,)."""
    generator = torch.Generator().manual_seed(seed)
    N = GROUPS * G
    lengths = torch.randint(1, LIMIT + 1, (N,), generator=generator)
    logp = -3 * torch.rand(N, int(lengths.max()), generator=generator)
    noise = torch.randn(2, *logp.shape, generator=generator)
    rewards = torch.randint(0, 4, (N, 2), generator=generator).float()
    rewards[::G] += torch.tensor([1.0, 0.5])  # no group flat by chance in either part: see NOTES
    return logp, logp + 0.3 * noise[0], logp + 0.5 * noise[1], lengths, rewards, torch.tensor([1.0, 0.25])


def trl_result(trainer, logp, old, reference, lengths, beta):
    """Advantages, loss, gradient by logp and logged statistics, as TRL computes them."""
    completions = [[2] * (int(n) - 1) + [1] for n in lengths]
    prompts = [{"prompt": "a"}] * len(lengths)
    trainer._generate = lambda prompts: (
        [[2]] * len(prompts), completions, None, [""] * len(prompts), None, {}, None, None
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    batch = trainer._generate_and_score_completions(prompts)
    logp = logp.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logp, torch.zeros_like(logp), None)
    trainer.beta = beta  # set late: with it at first, TRL fetches a reference model
    batch |= {"old_per_token_logps": old, "ref_per_token_logps": reference}
    loss = trainer._compute_loss(trainer.model, batch)
    (gradient,) = torch.autograd.grad(loss, logp)
    return batch["advantages"], loss.detach(), gradient, {
        name: values[-1] for name, values in trainer._metrics["train"].items() if values
    }


def our_result(logp, old, reference, lengths, advantages, beta, options):
    """Loss, gradient by logp and statistics of `grpo_loss`, for the same numbers."""
    mask = torch.arange(logp.shape[1]) < lengths.unsqueeze(1)
    logp = logp.clone().requires_grad_()
    options = dict(clip_low=0.2, clip_high=0.28) | options
    loss, sums = grpo_loss(logp, old, reference, advantages, mask, beta=beta, **options)
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient, mean_statistics(sums)


def compare_objective(trl_settings, our_options, beta, weighted, seeds):
    """The largest differences in loss , gradient and the statistics that both name."""
    differences = torch.zeros(3, dtype=torch.float64)
    for seed in seeds:
        logp, old, reference, lengths, rewards, weights = draw(seed)
        trainer = trl_trainer(rewards, weights, use_bias_correction_kl=weighted, **trl_settings)
        _, loss, gradient, logged = trl_result(trainer, logp, old, reference, lengths, beta)
        advantages = sum_then(rewards.view(GROUPS, G, -1), weights, "group").flatten()
        options = our_options | dict(kl_weighted=weighted)
        ours, slope, means = our_result(logp, old, reference, lengths, advantages, beta, options)
        comparable = not weighted and our_options.get("level") != "sequence"  # else see NOTES
        shared = means.keys() & logged.keys() if comparable else ()
        seen = [abs(loss - ours), (gradient - slope).abs().max(),
                max((abs(means[name] - logged[name]) for name in shared), default=float("nan"))]
        differences = torch.maximum(differences, torch.tensor(seen, dtype=torch.float64))
    return differences.tolist()


def compare_advantages(trl_settings, ours, seeds):
    """The largest difference between TRL's advantages and `ours(parts, weights)`."""
    worst = 0.0
    for seed in seeds:
        logp, old, reference, lengths, rewards, weights = draw(seed)
        trainer = trl_trainer(rewards, weights, loss_type="grpo", **trl_settings)
        theirs = trl_result(trainer, logp, old, reference, lengths, 0.0)[0].view(GROUPS, G)
        worst = max(worst, (theirs - ours(rewards.view(GROUPS, G, -1), weights)).abs().max().item())
    return worst


def flat_group():
    """TRL's and our largest advantage where every completion earned 0.45."""
    logp, old, reference, lengths, rewards, weights = draw(0)
    rewards[:] = torch.tensor([0.45, 0.0])
    trainer = trl_trainer(rewards, weights, loss_type="grpo")
    theirs = trl_result(trainer, logp, old, reference, lengths, 0.0)[0]
    ours = sum_then(rewards.view(GROUPS, G, -1), weights, "group")
    return theirs.abs().max().item(), ours.abs().max().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--batches", type=int, default=5, help="random batches a row is the worst of")
    seeds = range(parser.parse_args().batches)
    try:
        import trl
    except ImportError:
        print(f"error: {INSTALL}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore", FutureWarning)  # TRL's own
    print(f"TRL {trl.__version__}, torch {torch.__version__}: {GROUPS} groups of {G}, up to {LIMIT} tokens, "
          f"float32, the worst of {len(seeds)} batches\n")
    worst = 0.0
    print(f"{'advantages':<32}{'difference':>12}")
    for name, settings, ours in ADVANTAGES:
        difference = compare_advantages(settings, ours, seeds)
        worst = max(worst, difference)
        print(f"{name:<32}{difference:>12.1e}")
    print(f"\n{'loss_type':<24}{'KL':<10}{'loss':>10}{'gradient':>12}{'statistics':>12}")
    for name, settings, options in OBJECTIVES:
        for label, beta, weighted in (("none", 0.0, False), ("k3", BETA, False), ("k3 * ratio", BETA, True)):
            loss, gradient, statistics = compare_objective(settings, options, beta, weighted, seeds)
            worst = max(worst, loss, gradient)
            print(f"{name:<24}{label:<10}{loss:>10.1e}{gradient:>12.1e}"
                  + ("           -" if math.isnan(statistics) else f"{statistics:>12.1e}"))
    verdict = "below" if worst < TOLERANCE else "NOT below"
    print(f"\nlargest difference {worst:.1e}, {verdict} {TOLERANCE:.0e}\n")
    print(NOTES)
    theirs, ours = flat_group()
    print(f"\nthe largest advantage in groups where all earned 0.45: TRL {theirs:.1e}, here {ours:.1e}")
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
