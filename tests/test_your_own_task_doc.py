"""docs/your-own-task.md works as it stands: its files are written out, its commands are run."""

import json
import os
import re
import subprocess
from pathlib import Path

from programs import forking_python

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "your-own-task.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`(\w+\.py)`[^`]*\n\n```python\n(.*?)```", TEXT, re.DOTALL))


def test_a_new_task_of_two_short_files_goes_through_all_programs(tmp_path):
    assert list(FILES) == ["squares_data.py", "squares_rewards.py", "make_squares.py"]
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
        assert len(code.splitlines()) < 60
    commands, = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "run.sh").write_text(f'set -e\npython() {{ "{forking_python()}" "$@"; }}\n{commands}')
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "run.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = lambda name: map(json.loads, (tmp_path / "runs" / name).read_text().splitlines())
    losses = [line["loss"] for line in lines("sft/metrics.jsonl") if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    *_, last = lines("grpo/metrics.jsonl")
    assert "rewards/answer/mean" in last and last["step"] == 2
    assert set(json.loads((tmp_path / "runs" / "test" / "metrics.json").read_text())) >= {"accuracy", "unparsable"}
    assert done.stdout.splitlines()[-1].startswith("answer: ")
    dataset = {path.suffix for split in ("train", "valid", "test") for path in (tmp_path / "squares" / split).iterdir()}
    assert dataset == {".png"}  # no run writes into the dataset's own folders
