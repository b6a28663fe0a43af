"""docs/training-guide.md knows every metric that a run can write and every symptom that a run names."""

import json
import re
from collections import Counter
from pathlib import Path

import data.jsonl
import rewards.jmere
import rewards.jsonl
from grpo.runtime.settings import as_dict
from grpo.runtime.step_metrics import Symptoms
from grpo.settings import Settings
from grpo.variants import PRESETS, ZERO_VARIANCE_GROUPS
from programs import lines
from sft.train import Settings as StageOneSettings

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "training-guide.md").read_text(encoding="utf-8")
FAMILIES = "completions|clip_ratio|sampling|speculation|kl|seconds"  # of metrics, by what stands before the slash


def section(title: str) -> list[list[str]]:
    """The rows of the first table below a heading, as lists of cells, without its head."""
    rows = []
    for line in GUIDE.split(f"\n## {title}\n")[1].splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            break
    return rows[2:]


def documented() -> set[str]:
    return {name for first, *_ in section("Every metric") for name in re.findall(r"`([^`]+)`", first)}


def unknown(names) -> set[str]:
    """Those that no row has, by name or by pattern: <part> and <metric> stand for a task's own names."""
    known = documented()
    patterns = [re.compile(re.sub(r"<\w+>", r"[^/]+", name)) for name in known if "<" in name]
    return {name for name in names if name not in known and not any(pattern.fullmatch(name) for pattern in patterns)}


def test_every_metric_that_real_runs_write_is_in_the_table(folder, tmp_path):
    names = {name for run in ("sft", "grpo") for line in lines(folder / run / "metrics.jsonl") for name in line}
    names |= set(json.loads((folder / "test" / "metrics.json").read_text()))
    assert {"reward", "kl", "num_tokens", "f1"} <= names
    assert not unknown(names)
    validated = {name.removeprefix("valid/") for name in names if name.startswith("valid/")}
    assert not unknown(validated | set(rewards.jmere.metrics([], [])) | set(of_a_file(tmp_path)))


def of_a_file(folder):
    (folder / "train.jsonl").write_text('{"question": "2 + 2?", "answer": "4", "category": "sums"}\n')
    samples = data.jsonl.load(folder, "train")
    return rewards.jsonl.metrics(["4"], samples)


def test_metrics_that_only_some_runs_write_are_in_the_table_too():
    """Whatever looks like a metric's name in the code: `completions/max_length`."""
    sources = [path.read_text(encoding="utf-8") for folder in ("grpo", "sft") for path in (ROOT / folder).rglob("*.py")]
    names = {name for source in sources for name in re.findall(rf'"((?:{FAMILIES})/[a-z_]+(?:/[a-z_]+)*)"', source)}
    names |= {f"seconds/{phase}" for source in sources for phase in re.findall(r'phase\("(\w+)"\)', source)}
    assert {"completions/clipped_ratio", "clip_ratio/low_mean", "seconds/rollout"} <= names
    assert not unknown(names)


def test_a_metric_has_one_row():
    rows = Counter(name for first, *_ in section("Every metric") for name in re.findall(r"`([^`]+)`", first))
    assert {name for name, count in rows.items() if count > 1} <= {"loss", "grad_norm",
                                                                   "learning_rate"}  # of both trainers


def test_every_metric_in_the_table_is_one_that_the_code_knows():
    source = "\n".join(path.read_text(encoding="utf-8") for folder in ("grpo", "sft", "rewards")
                       for path in (ROOT / folder).rglob("*.py"))
    for name in documented():
        *_, last = [word for word in re.split(r"<\w+>|/", name) if word]
        stem = re.sub(r"^mner_|_order_free$", "", last)
        assert re.search(rf"[\"'/{{]{stem}\b", source), name


def test_a_run_names_a_symptom_once_after_several_rollouts_in_a_row_as_the_guide_names_it():
    healthy = {"frac_reward_zero_std": 0.5, "completions/clipped_ratio": 0.1, "kl": 0.01}
    sick = {"frac_reward_zero_std": 1.0, "completions/clipped_ratio": 0.9, "kl": 30.0}
    symptoms = Symptoms()
    said = [symptoms.found(line) for line in (sick, sick, healthy, sick, sick, sick, sick, healthy, sick, sick, sick)]
    assert [len(texts) for texts in said] == [0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0]
    named = {first.strip("*") for first, *_ in section("Symptoms")}
    assert all("docs/training-guide.md" in text and text.split(" (")[0] in named for text in said[5])
    assert not any(Symptoms().found({"step": 1}) for _ in range(9))  # a rollout of too long prompts


def test_every_setting_that_the_guide_names_is_one():
    """Every word in backquotes is a setting of a trainer, a metric, a preset, or a choice of a setting."""
    known = {**as_dict(Settings()), **as_dict(StageOneSettings())}
    words = set(re.findall(r"`([a-z]\w*)(?:[= ]\w+)?`", GUIDE)) | set(re.findall(r"--(\w+)", GUIDE))
    assert {"learning_rate", "beta", "predictions", "tokens_per_pass"} <= words
    assert words - set(known) - documented() - set(PRESETS) <= {*ZERO_VARIANCE_GROUPS, "none", "valid", "live", "last"}
    first = {name for cell, *_ in section("What to set first") for name in re.findall(r"`(\w+)`", cell)}
    assert first <= set(known) and {"learning_rate", "group_size", "beta", "max_completion_tokens"} <= first
