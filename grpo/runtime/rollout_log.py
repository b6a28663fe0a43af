"""The log of rollouts: every so often a few groups whole, for people to read (`rollouts.jsonl`; see grpo.report).

A record is one line, {"step", "epoch", "groups": [{id, prompt, target, images, box, text, entity, completions}]},
and a completion {text, pieces, finished, parts, reward, advantage, logp, ratio, ref_logp}; the last three and `pieces`
have one entry a token. `logp` is the log-probability when the rollout begins, under the scored distribution (at the
rollouts' temperature), `ratio` what all μ updates of this rollout have made of it, π_after/π_before. The objective
never sees that ratio: for μ = 1 its own is 1 throughout, and for μ > 1 it stops before the last update. So the recorded
groups, and only they, are scored twice more, before and after, in the same packs: in bfloat16 other packs alone would
move a ratio.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grpo.group import Group, packs
from grpo.runtime.dist import all_gather, all_reduce_max, all_reduce_sum, broadcast_from_rank_0, rank
from grpo.runtime.fsdp import reshard
from grpo.runtime.log import say
from grpo.runtime.memory import enough_memory
from grpo.runtime.metrics import append_line
from grpo.runtime.optim import idle_pack, pass_over
from grpo.runtime.run import Run


@dataclass
class RecordedGroups:
    """The groups of one record that this process holds, between `begin` and `end`.

    places  of the watched groups among all of this process's `groups`
    packs   the watched groups as they are scored
    before  (C,) log-probabilities of each of their completions, before the updates
    """

    step: int
    epoch: int
    groups: list[Group]
    places: list[int]
    packs: list[list[Group]]
    before: list[Tensor]


class RolloutLog:
    """Writes the records of one training run; `begin` and `end` stand around a rollout's updates, on every process.

    every   rollouts between records; the first and the last rollout are always recorded
    groups  of a record, over all processes; 0 for no log of rollouts
    step    rollouts that a run which goes on has behind it: records beyond are those of a process that was killed
    limit   bytes. A file that would outgrow it loses every second record, and from then on half as many are
            written: what is kept is spread evenly over the whole run, however long it becomes.
    """

    def __init__(self, run: Run, temperature: float, every: int, groups: int, limit: int, step: int = 0):
        self.run, self.temperature = run, temperature
        self.every, self.groups, self.limit = every, groups, limit
        self.last = -1
        self.path = Path(run.output) / "rollouts.jsonl"
        if rank() == 0 and not step:
            self.path.unlink(missing_ok=True)
        elif rank() == 0 and self.path.exists():
            self.keep(lambda lines: [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step])

    def begin(self, step: int, epoch: int, groups: list[Group], advantages: Tensor) -> RecordedGroups | None:
        """Before the updates of rollout `step`, from 0; None where it is not recorded. `advantages` (groups, G)."""
        if not self.groups or (step % self.every and step != self.last):
            return None
        places = self.choose(groups, advantages)
        some = packs([groups[place] for place in places], self.run.settings.tokens_per_pass)
        return RecordedGroups(step, epoch, groups, places, some, self.score(some))

    def choose(self, groups: list[Group], advantages: Tensor) -> list[int]:
        """Groups that teach before flat ones, else those with the smallest hash of their sample's id, whichever process
        drew them: a choice without taste, and one sample is preferred whenever it comes round, to be followed."""
        flat = [not any(row) for row in advantages.tolist()]
        names = [hashlib.sha256(group.prompt.id.encode()).hexdigest() for group in groups]
        order = [(flat[i], names[i], rank(), i) for i in range(len(groups))]
        return [place for *_, owner, place in sorted(all_gather(order))[: self.groups] if owner == rank()]

    @torch.no_grad()
    def score(self, some: list[list[Group]]) -> list[Tensor]:
        """(C,) a completion. Every process joins every forward."""
        policy, rows = self.run.policy, []
        passes = int(all_reduce_max(torch.tensor(len(some), device=policy.device)))
        for index in range(passes):
            pack = some[index] if index < len(some) else idle_pack(policy)
            with enough_memory(*pass_over(pack)):
                scores = policy.score(pack, self.temperature)
            rows += scores.logp.cpu().split(scores.lengths) if index < len(some) else []
        reshard(policy)
        return rows

    def end(self, watched: RecordedGroups | None, parts: dict[str, Tensor], rewards: Tensor, advantages: Tensor,
            ref_logps: list[Tensor] | None) -> None:
        """After the updates. `parts`, `rewards`, `advantages` are (groups, G) of all this process's groups, `ref_logps`
        their completions' tokens end to end, in any number of tensors."""
        if watched is None:
            return
        change = [(after - before).exp() for after, before in zip(self.score(watched.packs), watched.before)]
        lengths = [length for group in watched.groups for length in group.lengths]
        ref_rows = ref_logps and torch.cat(ref_logps).cpu().split(lengths)
        described, row = [], 0
        for place in watched.places:
            group, completions = watched.groups[place], []
            for i in range(len(group.completions)):
                completions.append({
                    **self.words(group, i),
                    "parts": {name: float(values[place, i]) for name, values in parts.items()},
                    "reward": float(rewards[place, i]), "advantage": round(float(advantages[place, i]), 5),
                    "logp": numbers(watched.before[row], 4), "ratio": numbers(change[row], 6),
                    "ref_logp": numbers(ref_rows[place * len(group.completions) + i], 4) if ref_rows else None})
                row += 1
            described.append({**describe(group, self.run), "completions": completions})
        self.write({"step": watched.step + 1, "epoch": watched.epoch, "groups": all_gather(described)})
        self.every = broadcast_from_rank_0(lambda: self.every)  # the first process may have thinned: all must agree on when to score

    def words(self, group: Group, i: int) -> dict:
        tokens, encoder = group.completions[i], self.run.encoder
        return {"text": encoder.decode(tokens), "pieces": text_pieces(encoder.tokenizer, tokens.tolist()),
                "finished": bool(group.finished[i])}

    def write(self, record: dict) -> None:
        if rank() or not record["groups"]:
            return
        size = len(json.dumps(record)) + 1
        if size > self.limit:
            return say(f"rollout {record['step']} is not recorded: {size} bytes, --rollout_log_megabytes allows {self.limit}")
        while self.path.exists() and self.path.stat().st_size + size > self.limit:
            self.thin()
        append_line(self.path, record)

    def thin(self) -> None:
        """Every second record goes."""
        self.keep(lambda lines: lines[::2] if len(lines) > 2 else [])
        self.every *= 2

    def keep(self, choose) -> None:
        """Of the file's lines; written beside and renamed, so that a reader sees the old file or the new one."""
        with self.path.open("rb") as file:
            kept = choose(file.readlines())
        new = self.path.with_name(self.path.name + ".new")
        new.write_bytes(b"".join(kept))
        new.replace(self.path)


def describe(group: Group, run: Run) -> dict:
    """What there is to show of a prompt: its text as the model reads it and, of the sample, what tasks commonly have.

    A task of one's own may have none of it, or other things under these names: then the prompt's text has to do.
    """
    sample, tokenizer = group.prompt.sample, run.encoder.tokenizer
    prompt = tokenizer.decode(group.prompt.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    images, box = getattr(sample, "images", None) or [getattr(sample, "image", None)], getattr(sample, "box", None)
    is_box = isinstance(box, (tuple, list)) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box)
    words = {name: getattr(sample, name, None) for name in ("text", "entity")}
    return {
        "id": group.prompt.id, "prompt": re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", prompt),
        "target": run.task.data.target(sample),
        "images": [str(Path(image).absolute()) for image in images if isinstance(image, (str, Path))],
        "box": list(box) if is_box else None,
        **{name: word if isinstance(word, str) else None for name, word in words.items()},
    }


def numbers(values: Tensor, digits: int) -> list[float | None]:
    return [round(value, digits) if math.isfinite(value) else None for value in values.tolist()]


def text_pieces(tokenizer, tokens: list[int]) -> list[str]:
    """The text of each token; joined they are the whole text. A character of several tokens stands with the last."""
    pieces, start = [""] * len(tokens), 0
    for i in range(len(tokens)):
        piece = tokenizer.decode(tokens[start : i + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # The mark of an unfinished character; more than a character's four bytes long it is no unfinished one.
        if not piece.endswith("\ufffd") or i + 1 == len(tokens) or i - start >= 4:
            pieces[i], start = piece, i + 1
    return pieces
