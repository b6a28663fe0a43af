"""docs/mathematics.md says what is so: its functions and tests exist, and its variants are the presets."""

import ast
import importlib
import inspect
import re
from dataclasses import asdict
from pathlib import Path

import grpo.advantage
import grpo.objective
from grpo.variants import PRESETS, Preset

ROOT = Path(__file__).parents[1]


def table(heading):
    """The rows below the table's first line `heading`, as lists of cells."""
    lines = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8").splitlines()
    rows = []
    for line in lines[lines.index(heading) + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    assert rows and all(len(row) == 3 for row in rows)
    return rows


EQUATIONS = table("| equation | function | test |")


def test_every_function_and_test_in_the_table_exists():
    for _, function, test in EQUATIONS:
        module, name = function.strip("`").rsplit(".", 1)
        assert inspect.isfunction(getattr(importlib.import_module(module), name)), function
        file, name = test.strip("`").split("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_every_test_in_the_table_reaches_its_function():
    """By name, in the test itself or through `grpo_loss`, which calls the objective's parts."""
    for _, function, test in EQUATIONS:
        name, (file, test) = function.strip("`").rsplit(".", 1)[1], test.strip("`").split("::")
        source = (ROOT / file).read_text(encoding="utf-8")
        body = re.search(rf"^def {test}\(.*?(?=^\S|\Z)", source, re.S | re.M).group()
        through = ("grpo_loss", "group_advantages", "loss_and_gradient", "gradient_of", "ppo_surrogate")
        assert any(f"{word}(" in body for word in (name, *through)), (function, test)


def test_every_formula_is_in_the_table():
    listed = {function.strip("`") for _, function, _ in EQUATIONS}
    for module in (grpo.advantage, grpo.objective):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("check_"):
                assert f"{module.__name__}.{name}" in listed


def test_every_preset_is_in_the_table_with_all_its_differences():
    rows = {name.strip("`"): text for name, text, _ in table("| name | differs by | paper |")}
    assert list(rows) == list(PRESETS)
    usual = asdict(Preset())
    for name, text in rows.items():
        told = {key: ast.literal_eval(value) for key, value in re.findall(r"`(\w+)=([^`]+)`", text)}
        differences = {key: value for key, value in asdict(PRESETS[name]).items() if key in usual
                       and value != usual[key]}
        del differences["source"]
        assert told == differences, name


def test_every_setting_discussed_is_a_setting():
    text = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")
    settings = {*asdict(Preset()), "denominator"}
    for names in re.findall(r"^\*\*[^*]+\*\* \((`[^)]+)\)", text, re.M):
        assert set(re.findall(r"`(\w+)`", names)) <= settings, names
