"""Which samples each rollout of Stage 2 holds; data/curriculum.py says how hard and easy ones are mixed."""

from data.curriculum import epoch_batches, none_share
from data.task import resolve_task
from grpo.runtime.metrics import MetricsLog
from grpo.runtime.run import read_lines


class Curriculum:
    """Which samples each epoch's rollouts hold. hard, easy: those that grpo.evaluate got wrong and right; what it did
    not answer is in neither, and without its predictions all are hard."""

    def __init__(self, settings, samples: list, is_none):
        s, share = settings, none_share(samples, is_none)
        self.hard, self.easy = samples, []
        if s.predictions:
            answered = read_lines(s.predictions, samples, "correct", bool, resolve_task(s.task))
            self.hard, self.easy = ([one for one, right in answered if right == easy] for easy in (False, True))
        self.epochs = [epoch_batches(
            self.hard, self.easy, epoch=index, batch_size=s.prompts_per_rollout, none_share=share, is_none=is_none,
            decay=s.decay, mixing=s.mixing if s.predictions else "raw", last=s.last_batch, seed=s.seed)
            for index in range(s.epochs)]
        every = [(index, batch, batch is epoch.batches[-1])
                 for index, epoch in enumerate(self.epochs) for batch in epoch.batches]
        self.plan = every[: s.max_rollouts or None]  # epoch, samples, whether they are the epoch's last, a rollout each
        metrics_log, drawn = (MetricsLog(s.output, f"{name}.jsonl") for name in ("curriculum", "drawn"))
        for index, epoch in enumerate(self.epochs):
            metrics_log.write(epoch.record)
            drawn.write({"epoch": index, "batches": [[sample.id for sample in batch] for batch in epoch.batches]})


def earlier_appearances(samples: list) -> list[int]:
    """How often each one came before in the list: twice in a rollout, a sample is to be answered in two ways."""
    return [sum(other is sample for other in samples[:i]) for i, sample in enumerate(samples)]
