"""A task is found by its name, here or anywhere."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data import task
from data.task import DATA_NAMES, REWARD_NAMES, resolve_task


ROOT = Path(__file__).parent.parent


def test_a_task_is_found_by_its_name():
    for name in ("more", "data.more,rewards.more"):
        found = resolve_task(name)
        assert (found.data.__name__, found.rewards.__name__) == ("data.more", "rewards.more")


def test_a_task_of_one_s_own_needs_no_file_here(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    names = " = ".join([*DATA_NAMES, *REWARD_NAMES, "None"])
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "squares.py").write_text(names)
    (tmp_path / "my_tasks" / "half.py").write_text(names.replace("metrics = ", ""))
    (tmp_path / "my_tasks" / "broken.py").write_text("import a_library_that_is_not_there")
    found = resolve_task("my_tasks.squares")
    assert found.data is found.rewards and found.data.__name__ == "my_tasks.squares"
    with pytest.raises(ValueError, match="my_tasks.half .*half.py. lacks metrics"):
        resolve_task("my_tasks.half")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        resolve_task("my_tasks.broken")


@pytest.mark.parametrize("fault", [ValueError, TypeError])
def test_a_fault_inside_a_task_is_not_taken_for_a_missing_module(tmp_path, monkeypatch, fault):
    (tmp_path / f"raises_{fault.__name__}.py").write_text(f"raise {fault.__name__}('its own')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(fault, match="^its own$"):
        resolve_task(f"raises_{fault.__name__}")


@pytest.mark.parametrize("name, message", [
    ("mroe", "unknown task 'mroe': no module data.mroe; did you mean 'more'"),
    ("x.yz", "unknown task 'x.yz': no module x.yz; known here: .*more"),
    ("", "unknown task ''"), ("..", "unknown task '..'"), ("json.decoder", "json.decoder .*lacks load"),
])
def test_an_unknown_task_is_refused_and_a_near_name_offered(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_task(name)


# ── names that collide with a user's own ─────────────────────────────────────────────────────────────────────────

HALVES = " = ".join([*DATA_NAMES, *REWARD_NAMES, "None"])


@pytest.fixture
def users_folder(tmp_path):
    """Somebody's folder with a package data, a module rewards.py and a task of their own."""
    files = {"data/__init__.py": "raise SystemExit('the data package of somebody else')", "data/squares.py": HALVES,
             "rewards.py": "x = 1", "borrows.py": f"from rewards import x\n{HALVES}",
             "misses.py": f"import rewards.x\n{HALVES}"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def python(folder, *words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def resolve(folder, name, before="import grpo"):
    return python(folder, "-c", f"{before}\nfrom data.task import resolve_task\nprint(resolve_task({name!r}))")


def test_our_packages_find_ours_where_a_users_own_have_their_names(users_folder):
    status, text = resolve(users_folder, "more")
    assert status == 0 and str(ROOT / "data" / "more.py") in text and str(ROOT / "rewards" / "more.py") in text, text
    status, text = resolve(users_folder, "more", before="import sft")
    assert status == 0 and str(ROOT / "data" / "more.py") in text, text
    status, text = python(users_folder, "-m", "grpo.report", "--help")
    assert status == 0 and "--output" in text, text


def test_a_users_task_in_a_folder_of_our_name_is_found_after_ours(users_folder):
    status, text = resolve(users_folder, "data.squares")
    assert status == 0 and text.count(str(users_folder / "data" / "squares.py")) == 2, text


@pytest.mark.parametrize("name", ["borrows", "misses"])
def test_a_users_module_that_ours_hides_is_one_line_that_names_the_file_in_the_way(users_folder, name):
    status, text = resolve(users_folder, f"{name},{name}")
    *_, last = text.splitlines()
    assert status == 1 and last.startswith("ValueError: ") and str(ROOT / "rewards" / "__init__.py") in last, text
    assert "During handling" not in text and "needs another one" in last


def test_a_module_imported_before_ours_is_named(users_folder):
    status, text = resolve(users_folder, "more", before="import rewards, grpo")
    assert (
        status == 1 and f"{users_folder / 'rewards.py'}'> hides the package rewards in {ROOT}" in text.splitlines()[-1]
    )
    assert "ImportError" in text.splitlines()[-1]


def test_a_known_name_is_not_answered_with_itself(monkeypatch):
    monkeypatch.setattr(task.importlib, "import_module",
                        lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name=name)))
    with pytest.raises(ValueError) as caught:
        resolve_task("more")
    assert "did you mean 'more'" not in str(caught.value)
