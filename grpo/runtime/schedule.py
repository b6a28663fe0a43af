"""Which samples each rollout of Stage 2 holds; data/curriculum.py says how hard and easy ones are mixed."""

from data.curriculum import Epoch, epoch_batches, none_share
from data.task import resolve_task
from grpo.runtime.metrics import MetricsLog
from grpo.runtime.run import read_lines


class Curriculum:
    """Which samples each epoch's rollouts hold. hard, easy: those that grpo.evaluate got wrong and right; what it did
    not answer is in neither, and without its predictions all are hard."""

    def __init__(self, settings, samples: list, is_none):
        self.settings, self.is_none = settings, is_none
        self.none_share = none_share(samples, is_none)
        self.mixing = settings.mixing if settings.predictions else "raw"
        self.hard, self.easy = samples, []
        if settings.predictions:
            answered = read_lines(settings.predictions, samples, "correct", bool, resolve_task(settings.task))
            self.hard, self.easy = ([one for one, right in answered if right == easy] for easy in (False, True))
        self.epochs = [self.epoch(index) for index in range(settings.epochs)]
        everything = sum(len(epoch.batches) for epoch in self.epochs)
        self.rollouts = min(everything, settings.max_rollouts or everything)
        metrics_log, drawn = (MetricsLog(settings.output, f"{name}.jsonl") for name in ("curriculum", "drawn"))
        for index, epoch in enumerate(self.epochs):
            metrics_log.write(epoch.record)
            drawn.write({"epoch": index, "batches": [[sample.id for sample in batch] for batch in epoch.batches]})

    def plan(self) -> list[tuple[int, list, bool]]:
        """(epoch, samples, whether they are the epoch's last) of every rollout."""
        every = [(index, batch, batch is epoch.batches[-1])
                 for index, epoch in enumerate(self.epochs) for batch in epoch.batches]
        return every[: self.rollouts]

    def epoch(self, index: int) -> Epoch:
        s = self.settings
        return epoch_batches(self.hard, self.easy, epoch=index, batch_size=s.prompts_per_rollout, is_none=self.is_none,
            none_share=self.none_share, decay=s.decay, mixing=self.mixing, last=s.last_batch, seed=s.seed)


def earlier_appearances(samples: list) -> list[int]:
    """How often each one came before in the list: twice in a rollout, a sample is to be answered in two ways."""
    return [sum(other is sample for other in samples[:i]) for i, sample in enumerate(samples)]
