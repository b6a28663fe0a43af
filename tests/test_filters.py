"""MP-CoT data: several candidates a sample, the re-prediction and the score filter, and what a second run costs."""

import json
import re
from collections import Counter

import pytest
from test_expert import KEY, completion, server

from data import jmere
from data.read import prompt_text
from data.task import resolve_task
from jmere_folder import write_jmere
from sft import annotate, filters

TASK = resolve_task("jmere")
GOLD = "[Mia Stone, per, Harbour FC, org, member of]"
WRONG = "[Mia Stone, per, Harbour FC, org, peer]"


def response(thought="seen", answer=GOLD):
    return f"<think>Image: {thought}. Alignment: she. Quintuples: so.</think>\n<answer>\n{answer}\n</answer>"


def answer(text):
    return f"<answer>{text}</answer>"


@pytest.fixture
def folder(tmp_path):
    return write_jmere(tmp_path / "JMERE", 3)


def annotated(folder, expert, *words):
    """(lines, report) of one run of the program."""
    output = folder.parent / "out" / "cot.jsonl"
    annotate.main(["--task", "jmere", "--data", str(folder), "--expert", expert, "--fraction", "1", "--attempts", "1",
                   "--output", str(output), *words])
    return ([json.loads(line) for line in output.read_text().splitlines()],
            json.loads(output.with_suffix(".report.json").read_text()))


def expert_file(folder, responses):
    path = folder.parent / "expert.jsonl"
    path.write_text("".join(json.dumps({"id": name, "response": text}) + "\n" for name, text in responses.items()))
    return f"file:{path}"


def all_good(candidates=2):
    """Responses under every id that three posts and so many candidates need; candidate k scores 0.7 + k/10."""
    said = {}
    for index in range(3):
        for number in range(1, candidates + 1):
            name = f"train/{index}" + (f"#{number}" if number > 1 else "")
            said |= {name: response(f"candidate {number}"), f"{name} repredict": answer(GOLD),
                     f"{name} score": f"Rules kept. <score>{0.7 + number / 10:.1f}</score>"}
    return said


BOTH = ("--candidates", "2", "--repredict", "True", "--score", "True")


def test_the_best_of_what_passes_both_filters_is_kept_and_counted(folder):
    said = all_good()
    said["train/0#2 repredict"] = answer(WRONG)  # falls before it is scored: the worse one of train/0 is left
    said["train/1#2 score"] = "<score>0.69</score>"
    said["train/2"], said["train/2#2"] = response(answer=WRONG), "no tags"  # nothing of train/2 is left
    lines, report = annotated(folder, expert_file(folder, said), *BOTH)
    assert [(line["id"], line["response"]) for line in lines] == [
        ("train/0", response("candidate 1")), ("train/1", response("candidate 1"))]
    assert report["stages"] == {
        "asked for": {"candidates": 6, "samples": 3}, "structure and answer right": {"candidates": 4, "samples": 2},
        "re-prediction right": {"candidates": 3, "samples": 2}, "score high enough": {"candidates": 2, "samples": 2}}
    assert report["fallen"] == {"answer is not the gold one": 1, "<think> missing": 1,
                                "re-prediction is not the gold answer": 1, "score below 0.7": 1}


def test_the_highest_score_wins(folder):
    lines, _ = annotated(folder, expert_file(folder, all_good()), *BOTH)
    assert [line["response"] for line in lines] == [response("candidate 2")] * 3


@pytest.mark.parametrize("words, stages", [
    (("--score", "True"), ["score high enough"]), (("--repredict", "True"), ["re-prediction right"]), ((), [])])
def test_each_filter_can_be_left_out_and_both(folder, words, stages):
    said = all_good()
    said["train/0 repredict"] = answer(WRONG)
    said["train/1 score"] = "<score>0.1</score>"
    _, report = annotated(folder, expert_file(folder, said), "--candidates", "2", *words)
    assert list(report["stages"])[2:] == stages
    assert report["stages"].get("re-prediction right", {"candidates": 5})["candidates"] == 5
    assert report["stages"].get("score high enough", {"candidates": 5})["candidates"] == 5


def test_equal_scores_are_decided_by_the_seed_for_each_sample_alone():
    def one(sample, number, score=0.9):
        return filters.Candidate(f"{sample.id}#{number}", sample, str(number), score)

    samples = [type("Sample", (), {"id": f"train/{index}"}) for index in range(40)]
    several = [one(sample, number) for sample in samples for number in range(3)]
    chosen = filters.best_of_each(several, 0)
    assert [candidate.sample for candidate in chosen] == samples
    assert set(Counter(candidate.response for candidate in chosen)) == {"0", "1", "2"}
    assert filters.best_of_each(several, 0) == chosen != filters.best_of_each(several, 1)
    assert filters.best_of_each(several[3:], 0) == chosen[1:]
    better = [one(samples[0], 3, 0.95), *several]
    assert filters.best_of_each(better, 0)[0].response == "3"


@pytest.mark.parametrize("reply, score", [
    ("<score>0.85</score>", 0.85), ("Rule 2 is broken.\n<score> 0.8 </score> That is all.", 0.8),
    ("<score>1</score>", 1), ("<score>1.0</score>", 1), ("<score>0</score>", 0), ("0.9", None), ("", None),
    ("<score>1.5</score>", None), ("<score>-0.5</score>", None), ("<score>high</score>", None),
    ("<score>0.9</score> or <score>0.2</score>", None), ("<score>0.9</score> <score>none</score>", None)])
def test_a_score_is_one_number_from_0_to_1_in_its_tags(reply, score):
    assert filters.read_score(reply) == score


def test_no_or_nonsensical_replies_to_the_filters_drop_the_candidate_and_say_why(folder):
    said = all_good(1)
    del said["train/0 repredict"]
    said["train/1 score"] = "good"
    del said["train/2 score"]
    with pytest.raises(ValueError, match="no response of use"):
        annotated(folder, expert_file(folder, said), "--repredict", "True", "--score", "True")
    report = json.loads((folder.parent / "out" / "cot.report.json").read_text())
    assert report["fallen"] == {"no re-prediction": 1, "score cannot be read": 1, "no score": 1}


def test_a_right_answer_is_spelled_as_the_gold_one(folder):
    sample = jmere.load(folder, "train")[0]
    loose = "<think>x</think> <answer>[ Mia Stone , per, Harbour FC, org, member_of]</answer> "
    assert jmere.normalise_response(loose, sample) == f"<think>x</think> <answer>\n{GOLD}\n</answer>"
    for kept in (response(answer=WRONG), "no tags", response() + " And more."):
        assert jmere.normalise_response(kept, sample) == kept


def test_the_filters_prompts_show_reasoning_and_rules_but_the_re_prediction_no_gold_answer(folder):
    sample, told = jmere.load(folder, "train")[0], response("she waves")
    expert = jmere.expert_prompt(sample)
    again, score = jmere.repredict_prompt(sample, told), jmere.score_prompt(sample, told)
    assert GOLD in expert and GOLD in score and GOLD not in again
    for text in (again, score):
        assert "Image: she waves. Alignment: she. Quintuples: so." in text and "<think>" not in text
    for text in (expert, again, score):
        assert sample.text in text
    assert all(part in expert for part in ("Image:", "Alignment:", "Quintuples:"))
    examples = prompt_text("jmere_score")
    assert filters.read_score(examples) is None and len(re.findall("<score>[0-9]", examples)) == 3


@pytest.mark.parametrize("words, message", [
    (("--candidates", "0"), "--candidates is 0"), (("--score_threshold", "7"), "--score_threshold is 7.0"),
    (("--task", "more", "--score", "True"), "--score: task more has no score_prompt"),
    (("--task", "more", "--repredict", "True"), "--repredict: task more has no repredict_prompt")])
def test_what_cannot_be_filtered_is_refused_at_once(folder, words, message):
    with pytest.raises(ValueError, match=message):
        annotated(folder, expert_file(folder, {}), *words)


# ---- against a real server ----

KINDS = {"repredict": "thought about this post", "score": "Score thoughts"}


def kind_of(body):
    text = body["messages"][0]["content"][-1]["text"]
    return next((kind for kind, words in KINDS.items() if words in text), "candidate")


def helpful(body):
    replies = {"candidate": response(), "repredict": answer(GOLD), "score": "<score>0.9</score>"}
    return 200, completion(replies[kind_of(body)])


@pytest.fixture
def point_at(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def set_environment(http):
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{http.server_port}/v1/")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return set_environment


def asked(http):
    return Counter(kind_of(body) for _, _, body in http.requests)


def test_every_question_comes_with_the_image(folder, point_at):
    with server(lambda number, body: helpful(body)) as http:
        point_at(http)
        lines, report = annotated(folder, "openai:gpt-x", *BOTH)
        assert asked(http) == {"candidate": 6, "repredict": 6, "score": 6}
        for _, _, body in http.requests:
            assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]
    assert len(lines) == 3 and report["stages"]["score high enough"] == {"candidates": 6, "samples": 3}


@pytest.mark.parametrize("kind, before", [
    ("candidate", {}), ("repredict", {"candidate": 6}), ("score", {"candidate": 6, "repredict": 6})])
def test_a_run_that_is_cut_off_pays_for_no_kind_of_question_twice(folder, point_at, kind, before):
    """The endpoint stops answering in the middle of each kind in turn; a second run asks what is missing."""
    answered = Counter()

    def stops(number, body):
        now = kind_of(body)
        if now == kind and answered[now] == 2:
            return 401, b"no more money"
        answered[now] += 1
        return helpful(body)

    with server(stops) as http:
        point_at(http)
        with pytest.raises(ValueError, match="no more money"):
            annotated(folder, "openai:gpt-x", *BOTH, "--concurrency", "1")
    assert answered == {**before, kind: 2}
    with server(lambda number, body: helpful(body)) as http:
        point_at(http)
        lines, _ = annotated(folder, "openai:gpt-x", *BOTH)
        assert asked(http) + answered == {"candidate": 6, "repredict": 6, "score": 6}
    assert len(lines) == 3
    with server(lambda number, body: (500, b"")) as http:
        point_at(http)
        assert annotated(folder, "openai:gpt-x", *BOTH)[0] == lines and not http.requests


def test_more_candidates_later_pay_for_the_new_ones_only(folder, point_at):
    with server(lambda number, body: helpful(body)) as http:
        point_at(http)
        annotated(folder, "openai:gpt-x")
        annotated(folder, "openai:gpt-x", "--candidates", "3")
        assert asked(http) == {"candidate": 9}


def test_an_ablation_reads_the_answers_that_another_run_has_paid_for(folder, point_at, tmp_path):
    with server(lambda number, body: helpful(body)) as http:
        point_at(http)
        annotated(folder, "openai:gpt-x", *BOTH)
        paid = len(http.requests)
        kept = tmp_path / "out" / "cot.responses.jsonl"
        annotate.main(["--task", "jmere", "--data", str(folder), "--expert", "openai:gpt-x", "--fraction", "1",
                       "--output", str(tmp_path / "other.jsonl"), "--candidates", "2", "--score", "True",
                       "--responses", str(kept)])
        assert len(http.requests) == paid and not (tmp_path / "other.responses.jsonl").exists()


@pytest.mark.parametrize("kind", ["repredict", "score"])
def test_a_filter_survives_an_endpoint_that_refuses_one_candidate(folder, point_at, kind):
    refused = []

    def behave(number, body):
        if kind_of(body) == kind and not refused:
            refused.append(number)
            return 400, b"not this one"
        return helpful(body)

    with server(behave) as http:
        point_at(http)
        lines, report = annotated(folder, "openai:gpt-x", *BOTH, "--concurrency", "1")
    assert len(lines) == 3 and sum(report["fallen"].values()) == 1
