"""Answer every sample of a split, over all ranks: evaluation, validation and the hard/easy split are this."""

import inspect
import json
from typing import Callable

from data.task import sample_hash
from grpo.engine.encode import Encoder
from grpo.engine.policy import Policy
from grpo.engine.rollout import Sampling
from grpo.engine.speculation import Speculation
from grpo.group import Group, Prompt
from grpo.runtime.dist import all_gather, merge_from_ranks, split_across_ranks, world_size
from grpo.runtime.fsdp import encode_images_unsharded, sample_unsharded
from grpo.runtime.liveness import heartbeat
from grpo.runtime.log import progress, say


class Prompts:
    """Samples → prompts, each encoded once as long as the cache has room (an image costs more than its text).

    cache_bytes bounds what is kept, pixels or features; what came first stays. With keep_features, what a frozen
    vision encoder has seen is kept in the pixels' place and it sees no image twice in the whole run; features then
    come from whichever batch was first, which may change their last bits from one run to another."""

    def __init__(self, encoder: Encoder, task, reasoning: bool = True, cache_bytes: float = 0,
                 keep_features: bool = False):
        self.encoder, self.task, self.reasoning, self.keep_features = encoder, task, reasoning, keep_features
        self.room, self.kept = cache_bytes, {}  # by the sample itself: ids may begin anew in another split
        self.too_long, self.longest = 0, 0  # prompts left out since the run began, tokens of the longest seen

    def __call__(self, sample) -> Prompt:
        if id(sample) in self.kept:
            return self.kept[id(sample)]
        try:
            images, text = self.task.data.build_prompt(sample, reasoning=self.reasoning)
        except (ValueError, OSError) as error:  # an image whose header is whole and whose rest is not
            raise ValueError(f"{sample.id}: {error}") from None
        prompt = self.encoder.encode(images, text, sample, sample.id)
        self.keep(prompt)
        return prompt

    def short_enough(self, samples: list, most: int) -> list[Prompt]:
        """The samples' prompts of at most so many tokens; longer ones are counted and left out, never cut."""
        encoded = [self(sample) for sample in samples]
        self.too_long += sum(len(prompt) > most for prompt in encoded)
        self.longest = max([self.longest, *map(len, encoded)])
        return [prompt for prompt in encoded if len(prompt) <= most]

    def keep(self, prompt: Prompt) -> bool:
        """Whether there was room. Counted again if it was there already, with pixels and not yet with features."""
        size = sum(part.nbytes for part in (prompt.pixels, prompt.features) if part is not None)
        if size > self.room:
            return False
        self.kept[id(prompt.sample)] = prompt  # which holds the sample: no other can have its place in memory
        self.room -= size
        return True

    def release_features(self, prompts: list[Prompt]) -> None:
        """After use: features leave the accelerator; they are forgotten, or kept in host memory instead of pixels."""
        for prompt in prompts:
            features, prompt.features = prompt.features, None
            if features is None or not self.keep_features:
                continue
            if self.kept.pop(id(prompt.sample), None):
                self.room += (prompt.pixels if prompt.pixels is not None else features).nbytes
            pixels, prompt.pixels, prompt.features = prompt.pixels, None, features.cpu()
            if not self.keep(prompt):
                prompt.pixels, prompt.features = pixels, None


def answer(policy: Policy, prompts_of: Prompts, samples: list, sampling: Sampling, *, group_size: int = 1,
           what: str = "evaluate", speculation: Speculation | None = None) -> list[list[str]]:
    """`group_size` completions' texts for every sample, in the samples' order, on every rank.

    Nothing is dropped: a prompt may be as long as it is, its images are scaled to the pixel limit."""
    mine, texts = split_across_ranks(samples), []
    turns = -(-len(samples) // world_size())  # of the longest share: every turn is a collective
    stretch = max(1, 2 * sampling.rows // group_size)  # images are large: twice what is written at once
    with progress(len(mine) * group_size, what, "answer") as bar:
        moved = lambda written, ended, spared: bar.update(ended)
        for start in range(0, turns, stretch):
            prompts = [prompts_of(sample) for sample in mine[start : start + stretch]]
            groups = draw(policy, prompts, group_size, sampling, speculation, moved)
            prompts_of.release_features(prompts)
            texts += [[prompts_of.encoder.decode(completion) for completion in group.completions] for group in groups]
    return merge_from_ranks(all_gather(texts))


def roll_out(policy: Policy, prompts: list[Prompt], group_size: int, sampling: Sampling,
             speculation: Speculation | None = None) -> list[Group]:
    """`sample` for training, with a bar of tokens."""
    with progress(len(prompts) * group_size * sampling.max_tokens, "rollout", "token") as bar:
        def moved(written: int, ended: int, spared: int) -> None:
            bar.total -= spared  # what ended early will not be written: time left is an upper bound that sinks
            bar.update(written)

        return draw(policy, prompts, group_size, sampling.check_training(), speculation, moved)


def draw(policy: Policy, prompts: list[Prompt], group_size: int, sampling: Sampling, speculation: Speculation | None,
         moved: Callable[[int, int, int], None]) -> list[Group]:
    """`sample`; images are encoded once, for all that comes after it, and the completions remembered. moved: called
    after each pass with the tokens written, the completions ended, the tokens that these will not need."""
    if policy.vision_is_frozen:
        encode_images_unsharded(policy, prompts)
    on_tokens = lambda *counts: (heartbeat(), moved(*counts))
    groups = sample_unsharded(policy, prompts, group_size, sampling, on_tokens, speculation)
    remember(speculation, groups)
    return groups


def remember(speculation: Speculation | None, groups: list[Group]) -> None:
    """All ranks' completions into every rank's history: a sample changes ranks from one epoch to the next."""
    if speculation:
        answered = [(group.prompt.id, [tokens.tolist() for tokens in group.completions]) for group in groups]
        for prompt_id, completions in all_gather(answered):
            speculation.remember(prompt_id, completions)


def remember_predictions(speculation: Speculation, path: str, task, samples: list, encoder: Encoder) -> None:
    """The completions in a file of predictions, to guess from. Lines that are of no sample here, or of another that has
    its id, are said once, and ignored."""
    known, unfit = {sample.id: sample_hash(task, sample) for sample in samples}, 0
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
                if entry.get("sample", known[entry["id"]]) != known[entry["id"]]:
                    raise KeyError
                speculation.remember(entry["id"], [encoder.completion(entry["completion"])])
            except (ValueError, KeyError, TypeError, AttributeError):
                unfit += 1
    if unfit:
        say(f"{path}: {unfit} lines are no completion of a sample here; nothing is guessed from them")


def check_reward_options(task, options: dict) -> None:
    """Refuse an option that the task's reward does not know, before anything is generated."""
    try:
        inspect.signature(task.rewards.reward).bind("", None, **options)
    except TypeError as error:
        raise ValueError(f"--reward_options: {error}") from None
