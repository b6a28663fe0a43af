"""The settings of grpo.train, with MORE-R1's defaults. No torch here, so that --help answers at once."""

import os
from dataclasses import dataclass
from functools import partial

from data.curriculum import LAST_BATCHES, MIXINGS
from grpo.runtime.settings import TrainingSettings, saving, setting, validation
from grpo.variants import PRESETS, Preset, resolve

curriculum, rollout, reward = (partial(setting, group=title) for title in ("curriculum", "rollout", "reward"))


@dataclass
class Settings(TrainingSettings):
    """Stage 2: Group Relative Policy Optimization. The defaults are MORE-R1's."""

    predictions: str = setting("", "grpo.evaluate's predictions of the training split: right is easy, wrong is hard; "
                                   "empty: the whole split in one shuffle", top=True, path="file", resume="free")
    objective: Preset = setting(resolve("more-r1"), f"{', '.join(PRESETS)}, or your module's `loss`", family=resolve)
    epochs: int = setting(4, "epochs of the curriculum", top=True, above=0)
    max_rollouts: int = rollout(0, "stop after so many rollouts; 0 for all that the epochs hold", least=0)
    prompts_per_rollout: int = setting(16, "prompts of one rollout, over all ranks", top=True, least=1)
    learning_rate: float = setting(1e-6, "peak of AdamW's learning rate", top=True, above=0)
    max_prompt_tokens: int = rollout(4096, "longer prompts are dropped and counted, never cut", least=1)
    mixing: str = curriculum("progressive", "progressive: all hard samples and γ^(t−1) easy ones each; raw: all",
                             choices=MIXINGS)
    decay: float = curriculum(0.5, "γ of the progressive mixing; 1: always 1:1, 0: hard only")
    last_batch: str = curriculum("fill", "an epoch's incomplete last rollout", choices=LAST_BATCHES)
    reward_weights: str = reward("", "name=number[,name=number]; others keep the task's weight")
    reward_options: str = reward("", "options of the task's reward, name=number[,name=number]")
    reward_seconds: float = reward(60.0, "longest call of the reward", above=0, resume="free")
    reward_failures: str = reward("stop", "a call that raises, takes too long or gives no finite number: stop the run; "
                                          "zero: all its parts; mask: leave the completion out",
                                  choices=("stop", "zero", "mask"))
    validate_every: int = validation(0, "rollouts between validations; 0: at the end of every epoch", least=0)
    rollout_log_every: int = saving(10, "rollouts between records of whole groups in rollouts.jsonl", least=1)
    rollout_log_groups: int = saving(4, "groups of one record; 0 for no log of rollouts", least=0)
    rollout_log_megabytes: float = saving(64.0, "largest rollouts.jsonl; beyond it every second record goes", above=0)
    resample_tries: int = rollout(3, "for zero_variance_groups=resampled: how often a group is drawn again", least=0)

    def check(self) -> None:
        super().check()
        check_pass(self)
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        if self.prompts_per_rollout % ranks:
            raise ValueError(f"--prompts_per_rollout is {self.prompts_per_rollout}; "
                             f"expected a multiple of the {ranks} ranks")


def check_pass(settings) -> None:
    """A group may be scored in parts, a completion may not."""
    if settings.max_completion_tokens > settings.tokens_per_pass:
        raise ValueError(f"--tokens_per_pass is {settings.tokens_per_pass}; a completion may have "
                         f"--max_completion_tokens {settings.max_completion_tokens}, and at least one goes into a pass")
