"""What the docs name is there: files, tests, modules, links between pages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
PACKAGES = "grpo|sft|data|rewards|tests|benchmarks|docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_test_and_link_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    for path, name in re.findall(rf"`((?:{PACKAGES})/[\w./-]+?\.(?:py|md|sh|json|png|svg))(?:::(\w+))?`", text):
        assert (ROOT / path).is_file(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no {name}"
    for folder in re.findall(rf"`((?:{PACKAGES})/[\w/-]*/)`", text):
        assert (ROOT / folder).is_dir(), folder
    for module in re.findall(r"python -m ((?:grpo|sft|data|benchmarks)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
