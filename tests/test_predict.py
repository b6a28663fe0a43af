"""grpo.predict: one sample of the user's own, for any task that makes samples of what is given."""

import json
import re
import sys

import pytest

from data import more
from data.toy.model import write_tiny_model
from grpo import predict
from grpo.runtime.settings import run_program
from more_folder import line, write_more

COMPLETION = "<think> Step 1: a man. </think> <answer>/per/per/peer</answer>"
POST = "<think>a man</think>\n<answer>[Ada, per, Harbour FC, org, member of]</answer>"


@pytest.fixture
def folder(tmp_path):
    """A dataset in data/, a model in run/model with the settings of its training beside it."""
    (tmp_path / "data").mkdir()
    write_more(tmp_path / "data", [line()])
    prompts = [more.build_prompt(one)[1] for one in more.load(tmp_path / "data", "train")]
    small = dict(vocabulary=300, hidden=32, layers=1, heads=2, key_value_heads=1)
    write_tiny_model(tmp_path / "run" / "model", prompts, **small)
    settings = {"settings": {"task": "more", "data": str(tmp_path / "data")}}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    return tmp_path


def words(folder, **changes):
    given = {"model": folder / "run" / "model", "image": folder / "data" / "img_org" / "train" / "a.png",
             "box": "0.5,0.5,0.2,0.4", "text": "Celtics beat Heat", "entity": "Heat", "max_completion_tokens": 5,
             **changes}
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def test_it_prints_what_the_checkpoint_says(folder, capsys):
    predict.main(words(folder))
    first = capsys.readouterr().out
    assert "(cut off after --max_completion_tokens 5)" in first and "answer: none that can be read" in first
    predict.main(words(folder, box="0.2,0.2,0.1,0.1", dtype="float32", temperature=2, seed=3))
    assert capsys.readouterr().out != first


def test_reasoning_and_label_are_printed_and_the_labels_are_those_of_the_training(folder, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(predict, "complete", lambda settings, task, one: asked.append(one) or (COMPLETION, True))
    predict.main(words(folder))
    assert capsys.readouterr().out == f"{COMPLETION}\n\nanswer: /per/per/peer\n"
    assert asked[0].labels == ("none", "/per/per/peer", "/per/org/member_of") and asked[0].box == (0.5, 0.5, 0.2, 0.4)


@pytest.mark.parametrize("given, seen", [({}, 5 * 784), ({"max_pixels": 3 * 784}, 3 * 784)],
                         ids=["as trained", "as asked"])
def test_a_image_is_as_large_as_in_training_unless_asked_otherwise(folder, monkeypatch, given, seen):
    path, asked = folder / "run" / "settings.json", []
    settings = json.loads(path.read_text())
    settings["settings"]["max_pixels"] = 5 * 784
    path.write_text(json.dumps(settings))
    monkeypatch.setattr(predict, "complete",
                        lambda settings, *_: asked.append(settings.max_pixels) or (COMPLETION, True))
    predict.main(words(folder, **given))
    assert asked == [seen]


def test_where_the_training_data_has_moved_data_is_asked_for(folder):
    (folder / "data").rename(folder / "moved")
    image = folder / "moved" / "img_org" / "train" / "a.png"
    with pytest.raises(ValueError, match="--data expected"):
        predict.main(words(folder, image=image))


def test_a_post_of_another_task_goes_through_the_same_program(folder, monkeypatch, capsys):
    monkeypatch.setattr(predict, "complete", lambda settings, task, one: (POST, True))
    predict.main(words(folder, task="jmere", text="Ada signs for Harbour FC", box=None, entity=None))
    assert "answer: ('Ada', 'per', 'Harbour FC', 'org', 'member_of')" in capsys.readouterr().out


BAD = {
    "no entity": ({"entity": None}, "--entity expected; task more takes --image, --text, --box, --entity, --data"),
    "an entity that is not in the text": ({"entity": "Bulls"}, "the entity 'Bulls' does not stand in the text"),
    "half a box": ({"box": "0.5,0.5"}, "box is '0.5,0.5'; cx,cy,w,h"),
    "a box in pixels": ({"box": "40,30,10,10"}, "lies outside the image"),
    "a box without bounds": ({"box": "0.5,0.5,1e308,1e308"}, "holds a value that is no fraction"),
    "no image": ({"image": "gone.jpg"}, "--image gone.jpg: no such file"),
    "no labels": ({"data": "run"}, "rel2id.json is missing"),
    "no such data": ({"data": "nowhere"}, "--data nowhere: no such folder"),
    "no model": ({"model": "nowhere/else", "data": "data"}, "nowhere/else"),
    "what the task has no use for": ({"task": "jmere"}, "--box: task jmere takes --image, --text, --data"),
    "an unknown task": ({"task": "mroe"}, "unknown task 'mroe'"),
    "a model without settings": ({"model": "run"}, "--data expected"),
}


@pytest.mark.parametrize("changes, expected", BAD.values(), ids=BAD)
def test_what_does_not_fit_is_one_line(folder, monkeypatch, capsys, changes, expected):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["predict", *words(folder, **changes)])
    with pytest.raises(SystemExit) as end:
        run_program(predict.main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch(f"error: .*{re.escape(expected)}.*\n", said), said


def test_settings_that_are_none_are_named(folder):
    (folder / "run" / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match="settings.json: found .*; expected the settings of a training run"):
        predict.main(words(folder))
