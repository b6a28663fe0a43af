"""Questions from a file: what a line may be, the parts of a file, what is refused with file and line."""

import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from data import jsonl
from data.jsonl import build_prompt, load, target
from data.task import load_samples, resolve_task
from grpo.runtime.answer import check_reward_options
from rewards.jsonl import VERIFIERS, correct, reward


def write(path, *lines, end="\n"):
    path.write_bytes("".join((line if isinstance(line, str) else json.dumps(line)) + end for line in lines).encode())
    return path


def question(i, **more):
    return {"question": f"What is {i} + {i}?", "answer": 2 * i, **more}


# ── a line ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_line_by_any_of_its_usual_names(tmp_path):
    samples = load(write(tmp_path / "q.jsonl", {"prompt": "a?", "answer": "x"}, {"question": "b?", "solution": "y"},
                         {"problem": "c?", "solution": "so <answer> z </answer>", "answer": None},
                         {"problem": "d?", "solution": r"thus \boxed{\frac{1}{2}}"},
                         {"question": "e?", "answer": "2 + 5 = 7\n#### 7"},
                         {"prompt": "f?", "problem": "kept", "answer": 3.5, "solution": "kept too", "level": [1]}),
                         "all")
    assert [sample.text for sample in samples] == ["a?", "b?", "c?", "d?", "e?", "f?"]
    assert [target(sample) for sample in samples] == [
        f"<answer>{text}</answer>" for text in ("x", "y", "z", r"\frac{1}{2}", "7", "3.5")]
    assert all(correct(target(sample), sample) for sample in samples)
    assert [sample.id for sample in samples] == [f"q/{number}" for number in range(1, 7)]
    assert samples[5].fields == {"problem": "kept", "solution": "kept too", "level": [1]}


def test_the_prompt_is_the_question_its_choices_and_the_form_of_the_answer(tmp_path):
    plain, named, unnamed, own = load(write(
        tmp_path / "q.jsonl", question(1, id=7, system="Be short.", category=3),
        {"question": "Dog or cat?", "choices": ["Dog", "cat"], "answer": "cat"},
        {"question": "Which?", "choices": ["Dog", "cat"], "answer": "B"},
        {"question": r"Give it in \boxed{}.", "answer": 1}), "all")
    text = lambda one, **more: build_prompt(one, **more)[1]
    assert (plain.id, plain.system, plain.category, jsonl.stratum(plain)) == ("7", "Be short.", "3", "3")
    assert text(plain) == "What is 1 + 1?\nFirst think in <think></think>, then write the answer in <answer></answer>."
    assert text(plain, reasoning=False) == "What is 1 + 1?\nWrite the answer in <answer></answer>."
    assert text(named, reasoning=False) == "Dog or cat?\nWrite the answer in <answer></answer>."
    assert text(unnamed, reasoning=False) == "Which?\nA. Dog\nB. cat\nWrite the answer in <answer></answer>."
    assert (
        text(own) == "Give it in \\boxed{}.\nFirst think in <think></think>." and text(own, reasoning=False) == own.text
    )
    whole, *_ = load(tmp_path / "q.jsonl", "all", whole_answer=True)
    assert text(whole, reasoning=False) == whole.text and not jsonl.is_none(whole)


def test_what_is_learned_without_an_expert_is_right(tmp_path):
    choices = {"question": "Which?", "choices": ["a cat", "a dog", "B"]}
    samples = load(write(tmp_path / "q.jsonl", *({**choices, "answer": answer} for answer in ("a dog", "A", 0, 1, 2))),
                   "all")
    assert [target(sample) for sample in samples] == [f"<answer>{text}</answer>"
                                                      for text in ("a dog", "A", "a cat", "a dog", "B")]
    assert all(correct(target(sample), sample) for sample in samples)
    with pytest.raises(ValueError,
                       match=r"q.jsonl:1: answer is .*; one that is right when it is given as an answer expected"):
        load(write(tmp_path / "q.jsonl", {"question": "?", "answer": "so <answer>x</ans,wer>"}), "all")


def test_images_are_found_beside_the_file_and_boxes_know_the_size_that_the_model_sees(tmp_path):
    (tmp_path / "img").mkdir()
    Image.new("RGB", (100, 80), "red").save(tmp_path / "img" / "a.png")
    file = write(tmp_path / "q.jsonl", {"question": "Where?", "image": "img/a.png", "answer": [10, 20, 30, 60]},
                 {"question": "What?", "images": ["img/a.png", "img/a.png"], "answer": "red"})
    halve = lambda width, height: (width // 2, height // 2)
    where, = load(write(tmp_path / "box.jsonl",
                        {"question": "Where?", "image": "img/a.png", "answer": [10, 20, 30, 60]}), "all",
                  verifier="boxes", seen_size=halve)
    images, text = build_prompt(where, reasoning=False)
    assert [image.size for image in images] == [(100, 80)] and (where.sizes,
                                                                where.seen_sizes) == ([(100, 80)], [(50, 40)])
    assert text == (
        "Where?\nBoxes are [x1, y1, x2, y2] in pixels; the image is 50 × 40.\nWrite the answer in <answer></answer>."
    )
    assert target(where) == "<answer>[[5, 10, 15, 30]]</answer>"
    with pytest.raises(ValueError, match=r"q.jsonl:1: .*a text, a number"):  # boxes are no answer for `text`
        load(write(tmp_path / "q.jsonl", {"question": "?", "image": "img/a.png", "answer": {}}), "all", verifier="text")
    assert file.exists()


def test_a_missing_image_stops_is_dropped_or_blank(tmp_path):
    file = write(tmp_path / "q.jsonl", {"question": "a?", "image": "no.png", "answer": "x"},
                 {"question": "b?", "answer": "y"})
    with pytest.raises(FileNotFoundError, match=r"q.jsonl:1: image .*no.png is missing"):
        load(file, "all")
    assert [sample.text for sample in load(file, "all", missing_images="drop")] == ["b?"]
    blank = load(file, "all", missing_images="blank")[0]
    assert [image.size for image in build_prompt(blank)[0]] == [(56, 56)]


def test_a_byte_order_mark_crlf_and_blank_lines_are_read_over(tmp_path):
    lines = [json.dumps(question(i)) for i in range(3)]
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([lines[0], "", lines[1], "  ", lines[2]]).encode())
    assert [sample.id for sample in load(tmp_path / "q.jsonl", "all")] == ["q/1", "q/3", "q/5"]


def test_a_verifier_of_ones_own_sees_all_fields(tmp_path, monkeypatch):
    (tmp_path / "my_check.py").write_text(
        "def near(answer, sample):\n    return abs(len(answer) - sample.fields['letters']) < 2\n"
    )
    file = write(tmp_path / "q.jsonl", {"question": "a?", "answer": "abc", "letters": 3})
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_check:near", f"{tmp_path}/my_check.py:near"):
        sample, = load(file, "all", verifier=name)
        assert correct("<answer>abcd</answer>", sample) and not correct("<answer>abcde</answer>", sample)
    for name, message in [("nomber", "auto, exact, text, number"), ("my_check:far", "my_check has no function far"),
                          ("no_such:f", "no such module"), (f"{tmp_path}/no.py:f", "no such file")]:
        with pytest.raises(ValueError, match=f"--verifier.*{message}"):
            load(file, "all", verifier=name)


# ── a file's parts, a folder ─────────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_parted_by_a_seed_in_shares_that_do_not_overlap(tmp_path):
    file = write(tmp_path / "q.jsonl", *(question(i) for i in range(100)))
    parts = {split: {sample.id for sample in load(file, split)} for split in ("train", "valid", "test", "all")}
    assert [len(parts[split]) for split in ("train", "valid", "test")] == [80, 10, 10]
    assert parts["train"] | parts["valid"] | parts["test"] == parts["all"] and len(parts["all"]) == 100
    assert {sample.id for sample in load(file, "test")} == parts["test"]
    assert {sample.id for sample in load(file, "test", split_seed=1)} != parts["test"]
    with pytest.raises(ValueError, match="split is 'dev'; of a single file test, valid, train or all"):
        load(file, "dev")


def test_equal_questions_are_in_one_part_and_a_new_line_moves_hardly_any(tmp_path):
    lines = [question(i % 50, note=i) for i in range(100)]
    file = write(tmp_path / "q.jsonl", *lines)
    asked = {split: {sample.text for sample in load(file, split)} for split in ("train", "valid", "test")}
    assert not asked["train"] & (asked["valid"] | asked["test"]) and not asked["valid"] & asked["test"]
    write(file, *lines, question(1000))
    after = {sample.text for sample in load(file, "test")}
    assert len(after & asked["test"]) >= len(asked["test"]) - 1


def test_a_folder_has_a_file_for_each_split(tmp_path):
    write(tmp_path / "train.jsonl", question(1))
    write(tmp_path / "dev.jsonl", question(2), question(3))
    assert [sample.id for sample in load(tmp_path, "dev")] == ["dev/1", "dev/2"]
    with pytest.raises(FileNotFoundError, match=r"test.jsonl is missing; .* holds dev.jsonl, train.jsonl"):
        load(tmp_path, "test")


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────

BAD = {
    "no JSON": ("{'question': 1}", "expected a JSON object"), "a list": ([1], "expected a JSON object"),
    "cut off": ('{"question": "a?", "ans', "expected a JSON object"), "null": ("null", "expected a JSON object"),
    "no question": ({"answer": 1}, "prompt or question or problem is None; a text expected"),
    "an empty question": ({"question": "", "answer": 1}, "is None; a text expected"),
    "a question of turns": ({"prompt": [{"role": "user"}], "answer": 1}, "a text expected"),
    "no answer": ({"question": "a?"}, "answer or solution is None; a text, a number or a list expected"),
    "an empty answer": ({"question": "a?", "answer": ""}, "is None"),
    "no answer in the list": ({"question": "a?", "answer": []}, "list"),
    "a bool": ({"question": "a?", "answer": False}, "False; a text, a number"),
    "an object": ({"question": "a?", "answer": {}}, "a text, a number"),
    "an answer of marks": ({"question": "a?", "answer": "<answer> </answer>"},
                           "answer is '<answer> </answer>'; a text expected"),
    "a worthless choice": ({"question": "a?", "answer": "C", "choices": ["x", "y"]},
                           "one of the line's choices by letter, text or number from 0 expected"),
    "equal choices": ({"question": "a?", "answer": "x", "choices": ["x", "x"]},
                      "a list of at most 26 different texts expected"),
    "choices of numbers": ({"question": "a?", "answer": "x", "choices": [1]}, "choices is [1]; a list of at most"),
    "an image of numbers": ({"question": "a?", "answer": "x", "image": 3}, "images is 3; a list of texts"),
    "a missing image": ({"question": "a?", "answer": "x", "image": "no.png"}, "is missing"),
    "an image that is none": ({"question": "a?", "answer": "x", "image": "q.jsonl"}, "cannot be read"),
    "a system turn of none": ({"question": "a?", "answer": "x", "system": 5}, "system is 5; a text expected"),
    "an id that is none": ({"question": "a?", "answer": "x", "id": [1]},
                           "id is [1]; a text or a whole number expected"),
    "an id that is taken": ({"question": "a?", "answer": "x", "id": "q/1"}, "q.jsonl:1 too; one of its own expected"),
    "brackets": ("[" * 100_000, "expected a JSON object"),
}


@pytest.mark.parametrize("line, message", BAD.values(), ids=BAD.keys())
def test_a_line_of_no_use_is_refused_with_file_and_line(tmp_path, line, message):
    file = write(tmp_path / "q.jsonl", question(1), line)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(file, "all")
    said = str(caught.value)
    assert said.startswith(f"{file}:2: ") and message in said and "\n" not in said and len(said) < 400


def test_bytes_that_are_no_utf_8_are_refused_with_their_line(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(json.dumps(question(1)).encode() + b'\n{"question": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="q.jsonl:2: found .* expected a JSON object .not UTF-8"):
        load(tmp_path / "q.jsonl", "all")


@pytest.mark.parametrize("verifier, line",
                         [("number", {"question": "a?", "answer": "many"}),
                          ("regex", {"question": "a?", "answer": "("}),
                                            ("choice", {"question": "a?", "answer": "A"}),
                                            ("boxes", {"question": "a?", "answer": [1, 2, 3, 4]})])
def test_an_answer_that_the_verifier_cannot_use_is_refused_with_file_and_line(tmp_path, verifier, line):
    with pytest.raises(ValueError, match="q.jsonl:1: answer is .* expected"):
        load(write(tmp_path / "q.jsonl", line), "all", verifier=verifier)


def test_too_few_questions_for_three_parts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 different questions cannot be parted in three; --split all"):
        load(write(tmp_path / "q.jsonl", question(1), question(2), question(1)), "train")


def test_a_model_that_cannot_see_is_refused_images_with_file_and_line(tmp_path):
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")

    def seen_size(width, height):
        raise ValueError("has images; a model of type llama reads text alone")

    with pytest.raises(ValueError, match=r"q.jsonl:1: has images; a model of type llama reads text alone"):
        load(write(tmp_path / "q.jsonl", {"question": "a?", "answer": "x", "image": "a.png"}), "all",
             seen_size=seen_size)


# ── tasks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_samples_of_one_id_are_refused_whatever_the_task():
    task = SimpleNamespace(
        data=SimpleNamespace(load=lambda folder, split: [SimpleNamespace(id=name) for name in "abca"])
    )
    with pytest.raises(ValueError,
                       match="here: samples 1 and 4 of split train have the same id 'a'; each needs its own"):
        load_samples(task, SimpleNamespace(data="here"), "train")


def test_a_split_without_a_sample_is_refused_whatever_the_task():
    task = SimpleNamespace(data=SimpleNamespace(load=lambda folder, split: []))
    with pytest.raises(ValueError, match="here: split train has no sample"):
        load_samples(task, SimpleNamespace(data="here"), "train")


def test_a_tasks_load_gets_the_settings_that_it_has_parameters_for():
    given = {}

    def load(folder, split, *, seed, seen_size, other=5):
        given.update(folder=folder, split=split, seed=seed, seen_size=seen_size, other=other)
        return [SimpleNamespace(id="a")]

    settings = SimpleNamespace(data="here", split="train", seed=3, missing_images="stop")
    assert load_samples(SimpleNamespace(data=SimpleNamespace(load=load)), settings, "valid", max)
    assert given == {"folder": "here", "split": "valid", "seed": 3, "seen_size": max, "other": 5}


def test_a_reward_of_ones_own_takes_the_place_of_the_tasks(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    sample, = load(write(tmp_path / "q.jsonl", question(1)), "all")
    (tmp_path / "short_reward.py").write_text("def reward(completion, sample):\n    return 1 / (1 + len(completion))\n")
    for name in ("short_reward", str(tmp_path / "short_reward.py")):
        rewards = resolve_task("jsonl", name).rewards
        assert rewards.WEIGHTS == {"reward": 1.0} and rewards.reward("abc", sample) == {"reward": 0.25}
        assert rewards.correct("<answer>2</answer>", sample) and rewards.metrics(["2"], [sample])["unparsable"] == 1.0
    (tmp_path / "strict_reward.py").write_text("def reward(completion, sample, *, c=0):\n    completion.split()[0]\n")
    strict = resolve_task("jsonl", str(tmp_path / "strict_reward.py"))
    check_reward_options(strict, {"c": 1})  # does not call it
    with pytest.raises(ValueError, match="--reward_options: .*'d'"):
        check_reward_options(strict, {"d": 1})
    (tmp_path / "parts_reward.py").write_text(
        "WEIGHTS = {'a': 1.0, 'b': 2.0}\nimport json\ndef reward(completion, sample, *, c=0):\n    return {'a': c, "
        "'b': 2}\n"
    )
    rewards = resolve_task("jsonl", "parts_reward").rewards
    assert rewards.reward("", sample, c=3) == {"a": 3, "b": 2} and rewards.WEIGHTS == {"a": 1.0, "b": 2.0}
    (tmp_path / "no_reward.py").write_text("x = 1\n")
    for name, message in [("no_reward", "no function reward"), ("nowhere", "no such module"),
                          ("nowhere.py", "no such file")]:
        with pytest.raises(ValueError, match=f"--rewards {name}: {message}"):
            resolve_task("jsonl", name)
    assert resolve_task("jsonl").rewards.reward is reward  # the task's own is as it was


def test_a_plain_name_is_a_module_of_yours_where_there_is_none_here(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    from data.task import DATA_NAMES, REWARD_NAMES

    (tmp_path / "vqa.py").write_text(" = ".join([*DATA_NAMES, *REWARD_NAMES, "None"]))
    task = resolve_task("vqa")
    assert task.data is task.rewards is sys.modules["vqa"]
    (tmp_path / "more.py").write_text("x = 1")  # ours comes first
    assert resolve_task("more").data.__name__ == "data.more"
    assert VERIFIERS.keys() == {"exact", "text", "number", "choice", "boxes", "regex"}
