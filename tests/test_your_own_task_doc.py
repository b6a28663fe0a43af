"""docs/your-own-task.md works as it stands: its files are written out, its commands are run."""

import json
import os
import re
import subprocess
from pathlib import Path

from tiny_backbones import write_text_model

from data.jsonl import load
from programs import forking_python

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "your-own-task.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`(\w+\.py)`[^`]*\n\n```python\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)


def shell(folder, commands):
    (folder / "run.sh").write_text(f'set -e\npython() {{ "{forking_python()}" "$@"; }}\n{commands}')
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "run.sh"], cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_file_of_questions_and_a_reward_of_ones_own_need_no_more_than_is_said(tmp_path):
    """But for the model, a tiny one here, the number of questions, and how many of them are asked."""
    lines, = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "questions.jsonl").write_text(lines.replace("12", "13")
                                              + lines.replace("Goethe", "Schiller").replace("Faust", "Tell"))
    assert len({sample.verifier for sample in load(tmp_path / "questions.jsonl", "all")}) == 3  # number, choice, text
    (tmp_path / "my_reward.py").write_text(FILES["my_reward.py"])
    write_text_model(tmp_path / "model", lines.splitlines() * 2)
    few = "--max_completion_tokens 4 --epochs 1 --group_size 2 --prompts_per_rollout 2 --output"
    commands = "".join(COMMANDS[:2]).replace("HuggingFaceTB/SmolLM2-135M-Instruct", "model")
    shell(tmp_path,
          re.sub(r"(grpo.train .*)--output", rf"\1{few}",
                 commands).replace("--model runs/mine/model --output runs/mine-test",
                    "--model runs/mine/model --max_completion_tokens 4 --output runs/mine-test"))
    log = [json.loads(line) for line in (tmp_path / "runs" / "mine-2" / "metrics.jsonl").read_text().splitlines()]
    assert "rewards/reward/mean" in log[-1] and "accuracy" in json.loads(
        (tmp_path / "runs" / "mine-test" / "metrics.json").read_text()
    )


def test_a_new_task_of_two_short_files_goes_through_all_programs(tmp_path):
    assert list(FILES) == ["my_reward.py", "squares_data.py", "squares_rewards.py", "make_squares.py"]
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
        assert len(code.splitlines()) < 60
    done = shell(tmp_path, COMMANDS[2])
    lines = lambda name: map(json.loads, (tmp_path / "runs" / name).read_text().splitlines())
    losses = [line["loss"] for line in lines("sft/metrics.jsonl") if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    *_, last = lines("grpo/metrics.jsonl")
    assert "rewards/answer/mean" in last and last["step"] == 2
    assert set(json.loads((tmp_path / "runs" / "test" / "metrics.json").read_text())) >= {"accuracy", "unparsable"}
    assert done.stdout.splitlines()[-1].startswith("answer: ")
    dataset = {path.suffix for split in ("train", "valid", "test") for path in (tmp_path / "squares" / split).iterdir()}
    assert dataset == {".png"}  # no run writes into the dataset's own folders
