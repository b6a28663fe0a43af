"""The rollout log: every so often a few groups whole, for people to read (`rollouts.jsonl`; see grpo.report).

A record is one line, {"step", "epoch", "groups": [{id, prompt, target, images, box, text, entity, completions}]},
and a completion {text, pieces, finished, parts, reward, advantage, logp, ratio, ref_logp}; the last three and `pieces`
have one entry a token. `logp` is the log-probability when the rollout begins, under the scored distribution (at the
rollouts' temperature): that of the first update's own pass, or the sampler's of groups of which no pass is made.
`ratio` is what all μ updates of this rollout have made of it, π_after/π_before, from one more pass over the packs
that hold a recorded group. The objective never sees that ratio: its own is of one update less, 1 for μ = 1."""

import hashlib
import json
import math
import re
from pathlib import Path

import torch

from grpo.advantage import zero_variance_groups
from grpo.group import Group, Pack, pad_rows
from grpo.runtime.dist import all_gather, broadcast_from_rank_0, rank
from grpo.runtime.files import append_line, write_whole
from grpo.runtime.fsdp import reshard
from grpo.runtime.log import say
from grpo.runtime.optim import equal_passes, packed_pass, passes
from grpo.runtime.run import Run


class RolloutLog:
    """Writes the records of one training run; every rank calls `record` after a rollout's updates.

    every   rollouts between records; the first and the last rollout are always recorded
    groups  of a record, over all ranks; 0 for no rollout log
    step    rollouts that a run which goes on has behind it: records beyond are those of a killed run
    limit   bytes. A file that would outgrow it loses every second record, and from then on half as many are
            written: what is kept is spread evenly over the whole run, however long it becomes."""

    def __init__(self, run: Run, temperature: float, every: int, groups: int, limit: int, step: int = 0):
        self.run, self.temperature = run, temperature
        self.every, self.groups, self.limit = every, groups, limit
        self.last = -1
        self.path = Path(run.output) / "rollouts.jsonl"
        if rank() == 0 and not step:
            self.path.unlink(missing_ok=True)
        elif rank() == 0 and self.path.exists():
            whole = [line for line in self.lines() if line.endswith(b"\n")]
            write_whole(self.path, b"".join(line for line in whole if json.loads(line)["step"] <= step))

    def record(self, step: int, epoch: int, packs: list[Pack], names: list[str]) -> None:
        """After the updates of rollout `step`, from 0, where it is to be recorded. names: of the reward parts."""
        if not self.groups or (step % self.every and step != self.last):
            return
        chosen = self.choose(packs)
        described: dict[Group, dict] = {}
        for pack, logps in self.score([pack for pack in packs if any(group.source in chosen for group in pack.groups)]):
            first = 0
            for group in pack.groups:
                if group.source in chosen:
                    one = described.setdefault(group.source, {**describe(group, self.run), "completions": []})
                    one["completions"] += self.completions(group, pack, first, logps, names)
                first += len(group.completions)
        self.write({"step": step + 1, "epoch": epoch, "groups": all_gather(list(described.values()))})
        # rank 0 may have thinned: all must agree on when to record
        self.every = broadcast_from_rank_0(lambda: self.every)

    def choose(self, packs: list[Pack]) -> list[Group]:
        """Groups that teach before zero-variance ones, else those with the smallest hash of their sample's id: a choice
        without taste, whichever rank drew them, in which a sample is preferred whenever it comes round."""
        # an idle pack's has no rewards, and one in parts is in several packs
        groups = [group.source for pack in packs for group in pack.groups if group.rewards is not None]
        groups = list(dict.fromkeys(groups))
        order = [(bool(zero_variance_groups(group.rewards[None], group.counted[None])),
                  hashlib.sha256(group.prompt.id.encode()).hexdigest(), rank(), i) for i, group in enumerate(groups)]
        return [groups[i] for *_, owner, i in sorted(all_gather(order))[: self.groups] if owner == rank()]

    @torch.no_grad()
    def score(self, packs: list[Pack]) -> list[tuple[Pack, torch.Tensor]]:
        """(pack, its (N, L) log-probabilities now), in the very packs of the update: in bfloat16 others alone would
        move a ratio. Every rank joins every forward."""
        policy, scored = self.run.policy, []
        for pack, score in passes(policy, equal_passes(packs, policy.device), self.temperature):
            with packed_pass(pack):
                scores = score()
            scored.append((pack, pad_rows(scores.logp, scores.lengths).cpu()))
        reshard(policy)
        return [(pack, logps) for pack, logps in scored if pack in packs]

    def completions(self, group: Group, pack: Pack, first: int, after: torch.Tensor, names: list[str]) -> list[dict]:
        """A group's as the record has them: the pack's rows from `first` on."""
        before, encoder, completions = pack.old_logp, self.run.encoder, []
        if before is None:  # no pass was made of it, and the sampler's own have to do
            before = pad_rows(torch.cat([row for one in pack.groups for row in one.logps]), pack.lengths)
        before = before.cpu()
        for i, tokens in enumerate(group.completions):
            row = first + i, slice(len(tokens))
            completions.append({
                "text": encoder.decode(tokens), "pieces": text_pieces(encoder.tokenizer, tokens.tolist()),
                "finished": bool(group.finished[i]), "parts": dict(zip(names, group.parts[i].tolist())),
                "reward": float(group.rewards[i]), "advantage": round(float(pack.advantages[first + i]), 5),
                "logp": numbers(before[row], 4), "ratio": numbers((after[row] - before[row]).exp(), 6),
                "ref_logp": None if pack.ref_logp is None else numbers(pack.ref_logp[row], 4)})
        return completions

    def write(self, record: dict) -> None:
        if rank() or not record["groups"]:
            return
        size = len(json.dumps(record)) + 1
        if size > self.limit:
            return say(f"rollout {record['step']} is not recorded: {size} bytes, --rollout_log_megabytes allows "
                       f"{self.limit}")
        while self.path.exists() and self.path.stat().st_size + size > self.limit:
            lines = self.lines()
            write_whole(self.path, b"".join(lines[::2] if len(lines) > 2 else []))
            self.every *= 2
        append_line(self.path, record)

    def lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines(keepends=True)


def describe(group: Group, run: Run) -> dict:
    """What there is to show of a prompt: its text as the model reads it and, of the sample, what tasks commonly have.

    A task of one's own may have none of it, or other things under these names: then the prompt's text has to do."""
    sample, tokenizer = group.prompt.sample, run.encoder.tokenizer
    prompt = tokenizer.decode(group.prompt.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    images, box = getattr(sample, "images", None) or [getattr(sample, "image", None)], getattr(sample, "box", None)
    is_box = isinstance(box, (tuple, list)) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box)
    words = {name: getattr(sample, name, None) for name in ("text", "entity")}
    if image_token := run.encoder.backbone.IMAGE_TOKEN:  # each image once and not as often as it has features
        prompt = re.sub(f"({re.escape(image_token)})+", image_token, prompt)
    return {"id": group.prompt.id, "prompt": prompt, "target": run.task.data.target(sample),
            "images": [str(Path(image).absolute()) for image in images if isinstance(image, (str, Path))],
            "box": list(box) if is_box else None,
            **{name: word if isinstance(word, str) else None for name, word in words.items()}}


def numbers(values: torch.Tensor, digits: int) -> list[float | None]:
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
