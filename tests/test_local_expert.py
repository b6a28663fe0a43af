"""A checkpoint on this machine as the expert: its answers, kept as they come and never written twice."""

import json

import pytest

from data import more
from data.toy.model import write_tiny_model
from grpo.engine.encode import Encoder
from grpo.engine.rollout import Sampling, sample
from grpo.engine.weights import load_policy
from more_folder import line, write_more
from sft import annotate, experts
from sft.filters import Request

GREEDY = {"max_tokens": 6, "temperature": 0}


@pytest.fixture
def folder(tmp_path):
    write_more(tmp_path, [line(h={"name": name, "pos": [0, 1]}) for name in ("Heat", "Celtics", "beat")])
    prompts = [more.build_prompt(one)[1] for one in more.load(tmp_path, "train")]
    write_tiny_model(tmp_path / "model", prompts, vocabulary=300, hidden=32, layers=1, heads=2, key_value_heads=1)
    return tmp_path


@pytest.fixture
def requests(folder):
    prompt = lambda one: (more.build_prompt(one)[0], more.expert_prompt(one))
    return [Request(one.id, lambda one=one: prompt(one)) for one in more.load(folder, "train")]


def ask(folder, requests, **options):
    expert = experts.local_expert(str(folder / "model"), {**GREEDY, **options})
    return experts.ask_all(expert, requests, folder / "answers.jsonl")


def test_it_answers_what_the_checkpoint_says(folder, requests):
    answers = ask(folder, requests)
    encoder, policy = Encoder(str(folder / "model")), load_policy(str(folder / "model"))
    prompt = encoder.encode(*requests[1].prompt(), id="train/1")
    group, = sample(policy, [prompt], 1, Sampling(6, encoder.end_tokens, 0.0))
    assert answers["train/1"] == encoder.decode(group.completions[0]) and list(answers) == [one.id for one in requests]
    kept = [json.loads(row) for row in (folder / "answers.jsonl").read_text().splitlines()]
    assert {row["id"]: row["response"] for row in kept} == answers and kept[1]["tokens_out"] <= 6 < kept[1]["tokens_in"]


def test_a_run_that_was_cut_off_goes_on_behind_its_last_answer(folder, requests, monkeypatch, capsys):
    monkeypatch.setattr(experts, "AT_ONCE", 1)
    broken = Request("train/2", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(folder, [*requests[:2], broken], temperature=0.8)
    first = (folder / "answers.jsonl").read_text()
    assert len(first.splitlines()) == 2
    answers = ask(folder, requests, temperature=0.8)
    assert (folder / "answers.jsonl").read_text().startswith(first) and len(answers) == 3
    assert "2 of 3 responses are there already" in capsys.readouterr().out
    monkeypatch.setattr("grpo.runtime.run.load_frozen", None)  # nothing is left to ask: no weights are loaded
    assert ask(folder, requests, temperature=0.8) == answers


def test_its_answers_go_through_the_filter(folder):
    words = ["--data", str(folder), "--expert", f"local:{folder / 'model'}", "--fraction", "1", "--output",
             str(folder / "cold.jsonl"), "--expert_options", '{"max_tokens": 3}']
    with pytest.raises(ValueError, match="no response of use for any of 3 drawn samples"):
        annotate.main(words)
    assert json.loads((folder / "cold.report.json").read_text())["fallen"] == {"<think> missing": 3}
    assert len((folder / "cold.responses.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("options, message", [
    ('{"max_token": 3}', "'max_token' is 3; a number for one of max_tokens, temperature"),
    ('{"temperature": "hot"}', "'temperature' is 'hot'; a number for one of"), ("[1]", "a JSON object expected"),
])
def test_an_option_that_it_does_not_have_is_refused_before_anything_is_loaded(folder, options, message):
    with pytest.raises(ValueError, match=message):
        annotate.main(["--data", str(folder), "--expert", "local:nowhere", "--output", str(folder / "cold.jsonl"),
                       "--expert_options", options])


def test_a_checkpoint_that_is_not_there_is_named(folder):
    with pytest.raises(ValueError, match="nowhere/else"):
        annotate.main(["--data", str(folder), "--expert", "local:nowhere/else", "--output", str(folder / "cold.jsonl")])
