"""What a program answers before it loads anything heavy: --help, a misspelled setting, a path that is not there."""

import importlib
import json
import re
import subprocess
import sys

import pytest

from benchmarks.startup import PROGRAMS
from more_folder import line, write_more
from programs import ROOT
from test_plan import SEVEN

# `python -m PROGRAM` several times over, each as if it were the first. What would load torch or transformers fails.
STARTS = """
import contextlib, io, json, runpy, sys
sys.modules["torch"] = sys.modules["transformers"] = None
program, said = sys.argv[1], []
for words in json.loads(sys.argv[2]):
    out, status, sys.argv = io.StringIO(), 0, [program, *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
    said.append((status, out.getvalue()))
print(json.dumps(said))
"""


def start(code, *words, cwd):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], env=environment, cwd=cwd, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_refusals_need_neither_torch_nor_transformers(tmp_path, program):
    misspelled, right, missing, expected = PROGRAMS[program]
    help, unknown, gone = start(STARTS, program, json.dumps([["--help"], misspelled, missing]), cwd=tmp_path)
    assert help[0] == 0 and help[1].startswith(f"usage: python -m {program} ") and f"--{right} " in help[1]
    assert unknown[0] == 2 and unknown[1].startswith("error: no setting") and f"did you mean {right}?" in unknown[1]
    assert gone[0] == 2 and gone[1].startswith("error: ") and expected in gone[1] and gone[1].count("\n") == 1
    assert not list(tmp_path.iterdir())  # and nothing is written


def test_a_remote_expert_is_asked_without_torch(tmp_path):
    """All of sft.annotate but the endpoint itself, which here is a dead port; and a file's responses to the end."""
    write_more(tmp_path, [line()] * 4)
    steps = " ".join(f"Step {k}: because." for k in range(1, 7))
    (tmp_path / "expert.jsonl").write_text("".join(json.dumps(
        {"id": f"train/{i}", "response": f"<think> {steps} </think> <answer>none</answer>"}) + "\n" for i in range(4)))
    words = ["--data", ".", "--fraction", "1", "--output", "out/cold.jsonl", "--expert"]
    asked = STARTS.replace("program, said",
                           "import os; os.environ |= dict(OPENAI_BASE_URL='http://127.0.0.1:9', OPENAI_API_KEY='k')\n"
                           "program, said")
    by_file, by_endpoint = start(asked, "sft.annotate", json.dumps([
        [*words, "file:expert.jsonl"], [*words, "openai:m", "--attempts", "1"]]), cwd=tmp_path)
    assert by_file[0] == 0 and "4 responses" in by_file[1], by_file
    assert by_endpoint[0] == 2 and "Connection refused" in by_endpoint[1], by_endpoint


def test_a_plan_loads_no_engine(tmp_path, monkeypatch, capsys):
    """It counts on transformers' own class; of grpo.engine it reads names and sizes, from modules without torch."""
    loads = re.compile(r"^(import|from) (torch|transformers)", re.M)
    heavy = [path for path in (ROOT / "grpo" / "engine").rglob("*.py") if loads.search(path.read_text())]
    assert {path.stem for path in heavy} >= {"policy", "rollout", "head", "lora", "qwen2_5_vl"}
    for path in heavy:
        monkeypatch.setitem(sys.modules, ".".join(path.relative_to(ROOT).with_suffix("").parts),
                            None)  # its import fails
    for name in [name for name in sys.modules if name.startswith("grpo.plan")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "config.json").write_text(json.dumps(SEVEN))
    monkeypatch.setattr(sys, "argv", ["plan", "--model", str(tmp_path), "--gpus", "8"])
    importlib.import_module("grpo.plan.__main__").main()
    assert "8.292 billion parameters" in capsys.readouterr().out
