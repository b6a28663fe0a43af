"""Answer every sample of a split, over all processes: evaluation, validation and the hard/easy split are this."""

from grpo.encode import Encoder
from grpo.group import Group, Prompt
from grpo.journal import progress
from grpo.policy import Policy
from grpo.rollout import Sampling
from grpo.sharding import gather, sample_whole, see_whole, share, unshare


def encode_sample(encoder: Encoder, task, sample, reasoning: bool = True) -> Prompt:
    """A task's sample → prompt."""
    pictures, text = task.data.build_prompt(sample, reasoning=reasoning)
    return encoder.encode(pictures, text, sample, sample.id)


def answer(
    policy: Policy, encoder: Encoder, task, samples: list, sampling: Sampling, *,
    reasoning: bool = True, group_size: int = 1, what: str = "evaluate",
) -> list[list[str]]:
    """`group_size` completions' texts for every sample, in the samples' order, on every process.

    Nothing is dropped: a prompt may be as long as it is, its pictures are scaled to the pixel limit.
    """
    mine, texts = share(samples), []
    # Encoded pictures are large: a few times what is written at once is enough to keep all rows busy.
    stretch = max(1, 4 * sampling.rows // group_size)
    with progress(len(mine), what, "sample") as bar:
        for start in range(0, len(mine), stretch):
            prompts = [encode_sample(encoder, task, sample, reasoning) for sample in mine[start : start + stretch]]
            if policy.vision_is_frozen:
                see_whole(policy, prompts)
            ended = Ended(bar, group_size)
            groups: list[Group] = sample_whole(policy, prompts, group_size, sampling, ended)
            texts += [[encoder.decode(completion) for completion in group.completions] for group in groups]
    return unshare(gather(texts))


class Ended:
    """Moves a bar of samples by the completions that end."""

    def __init__(self, bar, group_size: int):
        self.bar, self.group_size, self.count = bar, group_size, 0

    def __call__(self, written: int, ended: int) -> None:
        before = self.count // self.group_size
        self.count += ended
        self.bar.update(self.count // self.group_size - before)
