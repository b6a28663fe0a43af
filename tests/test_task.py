"""A task is found by its name, here or anywhere."""
import pytest

from data.task import DATA_NAMES, REWARD_NAMES, resolve_task


def test_a_task_is_found_by_its_name():
    for name in ("more", "data.more,rewards.more"):
        task = resolve_task(name)
        assert (task.data.__name__, task.rewards.__name__) == ("data.more", "rewards.more")


def test_a_task_of_one_s_own_needs_no_file_here(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    names = " = ".join([*DATA_NAMES, *REWARD_NAMES, "None"])
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "squares.py").write_text(names)
    (tmp_path / "my_tasks" / "half.py").write_text(names.replace("metrics = ", ""))
    (tmp_path / "my_tasks" / "broken.py").write_text("import a_library_that_is_not_there")
    task = resolve_task("my_tasks.squares")
    assert task.data is task.rewards and task.data.__name__ == "my_tasks.squares"
    with pytest.raises(ValueError, match="my_tasks.half lacks metrics"):
        resolve_task("my_tasks.half")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        resolve_task("my_tasks.broken")


@pytest.mark.parametrize("name, message", [
    ("mroe", "unknown task 'mroe': no module data.mroe; did you mean 'more'"),
    ("x.yz", "unknown task 'x.yz': no module x.yz; known here: .*more"),
    ("", "unknown task ''"), ("..", "unknown task '..'"), ("json.decoder", "json.decoder lacks load"),
])
def test_an_unknown_task_is_refused_and_a_near_name_offered(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_task(name)
