"""The rings: what may import what, over the syntax trees; how much a reader has to read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the inside out; a module may import its own ring and those before it.
RINGS = (("rewards",), ("data",), ("grpo.advantage", "grpo.objective", "grpo.variants", "grpo.group"),
         ("grpo.engine",), ("grpo.runtime",), ("grpo", "sft"), ("grpo.plan", "grpo.report", "benchmarks"))
LESSON = [ROOT / "grpo" / f"{name}.py" for name in ("train", "advantage", "objective", "variants", "group")] + [
    ROOT / "grpo" / "engine" / f"{name}.py" for name in ("policy", "rollout", "attention", "head")]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): ast.parse(path.read_text())
           for package in ("grpo", "sft", "data", "rewards", "benchmarks")
           for path in sorted((ROOT / package).rglob("*.py"))}


def ring(module: str) -> int:
    """The ring of the longest name that the module's begins with."""
    fits = [(len(name), number) for number, names in enumerate(RINGS) for name in names
            if f"{module}.".startswith(f"{name}.")]
    return max(fits)[1]


def imports(module: str) -> set[str]:
    """Our own modules that it imports, anywhere in it."""
    found = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            found |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module
                      for a in node.names}
    return {name for name in found if name in MODULES} - {module}


def reached(module: str) -> set[str]:
    seen, todo = set(), [module]
    while todo:
        new = imports(todo.pop()) - seen
        seen |= new
        todo += new
    return seen


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_inwards_and_never_in_a_circle(module):
    outward = {other for other in imports(module) if ring(other) > ring(module)}
    assert not outward, f"{module} imports {outward} from a ring further out"
    assert module not in reached(module), f"{module} imports itself by way of others"


def test_no_two_packages_import_each_other():
    package = lambda module: next(n for n in sorted((n for r in RINGS for n in r), key=len, reverse=True)
                                  if f"{module}.".startswith(f"{n}."))
    edges = {(package(module), package(other)) for module in MODULES for other in imports(module)}
    assert not {(a, b) for a, b in edges if a != b and (b, a) in edges and not {a, b} <= set(RINGS[2])}


@pytest.mark.parametrize("module", ["grpo.runtime.dist", "grpo.runtime.log"])
def test_ranks_and_lines_need_no_engine(module):
    assert not {name for name in reached(module) if ring(name) == 3 or name == "grpo.runtime.fsdp"}


def test_rewards_and_the_report_import_no_torch():
    for module, tree in MODULES.items():
        if module.startswith(("rewards", "grpo.report")):
            names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            assert not {name for name in names if name.split(".")[0] in ("torch", "transformers")}, module


def lines(path: Path) -> int:
    return sum(bool(line.strip()) for line in path.read_text().splitlines())


def functions():
    for path in (path for package in ("grpo", "sft", "data", "rewards") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def test_the_lesson_can_be_read_in_a_sitting(capsys):
    """pytest -s prints the figures."""
    sizes = {str(path.relative_to(ROOT)): lines(path) for path in LESSON}
    longest = max(functions())
    print(*(f"{size:6} {name}" for name, size in sizes.items()), sep="\n")
    print(
        f"{sum(sizes.values()):6} lines of the lesson; the longest function of the product has {longest[0]}: "
        f"{longest[1]}"
    )
    assert sum(sizes.values()) <= 1400 and longest[0] <= 60
    assert sizes["grpo/train.py"] + lines(ROOT / "grpo" / "settings.py") <= 300
    assert lines(ROOT / "grpo" / "minimal.py") <= 150 and len(list((ROOT / "grpo").glob("*.py"))) <= 12


def test_no_line_is_wider_than_120():
    wide = [f"{path}:{number}" for package in ("grpo", "sft", "data", "rewards", "tests", "benchmarks")
            for path in (ROOT / package).rglob("*.py")
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
    assert not wide


def test_what_is_no_python_is_installed_too():
    setup = ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
    given, = (ast.literal_eval(word.value) for word in setup if getattr(word, "arg", "") == "package_data")
    installed = {path for package, patterns in given.items() for pattern in patterns
                 for path in (ROOT / package.replace(".", "/")).glob(pattern)}
    files = {path for package in ("grpo", "sft", "data", "rewards") for path in (ROOT / package).rglob("*")
             if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files and not files - installed
    assert all((path.parent / "__init__.py").is_file() for package in ("grpo", "sft", "data", "rewards")
               for path in (ROOT / package).rglob("*.py"))
