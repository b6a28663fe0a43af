"""docs/variants.md works as it stands: each module is written outside the repository and run against the built-in
preset."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from grpo.objective import count_terms, grpo_loss, mean_statistics
from grpo.runtime.settings import as_dict, parse
from grpo.settings import Settings
from grpo.variants import load_objective, loss_options, resolve

TEXT = (Path(__file__).parent.parent / "docs" / "variants.md").read_text(encoding="utf-8")
MODULES = dict(re.findall(r"`(my_\w+)\.py`:\n\n```python\n(.*?)```", TEXT, re.DOTALL))
TWINS = {"my_dr_grpo": "dr-grpo", "my_gspo": "gspo", "my_sapo": "sapo", "my_clipped": "grpo"}
LIMIT = 9


@pytest.fixture
def forks(tmp_path, monkeypatch):
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


def batch(seed):
    """Log-probabilities that have moved apart, ragged rows with NaN behind them, one row with an empty mask."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([5, 7, 1, 0, 3, 6])[:, None]
    logp = (-draw(6, 7).abs()).masked_fill(~mask, float("nan"))
    return logp, logp + 0.3 * draw(6, 7), logp + 0.3 * draw(6, 7), 2 * draw(6), mask


def value_and_gradient(loss, arguments, **options):
    logp = arguments[0].clone().requires_grad_()
    value, sums = loss(logp, *arguments[1:], **options)
    gradient, = torch.autograd.grad(value, logp)
    return value.detach(), gradient, mean_statistics(sums)


def test_the_page_shows_four_short_modules():
    assert MODULES.keys() == TWINS.keys()
    assert all(len([line for line in code.splitlines() if line.strip()]) <= 20 for code in MODULES.values())


@pytest.mark.parametrize("name", TWINS)
def test_a_module_of_the_page_gives_the_presets_loss_and_gradient(forks, name):
    fork, ours = resolve(name), resolve(TWINS[name])
    if name == "my_clipped":
        ours = resolve("grpo", beta=fork.beta)
    for part in ("scale", "updates", "group_size"):
        assert getattr(fork, part) == getattr(ours, part)
    for seed in range(5):
        arguments = batch(seed)
        ours_get = (*arguments[:3], arguments[3].clamp(-1, 1), arguments[4]) if name == "my_clipped" else arguments
        whole = {"denominator": count_terms(arguments[4], fork.aggregate)}
        value, gradient, statistics = value_and_gradient(load_objective(name), arguments, **loss_options(fork, LIMIT),
                                                         **whole)
        expected, slopes, _ = value_and_gradient(grpo_loss, ours_get, **loss_options(ours, LIMIT), **whole)
        assert torch.allclose(value, expected, rtol=1e-12) and torch.allclose(gradient, slopes, rtol=1e-12, atol=1e-15)
        assert all(value == value for value in statistics.values())


@pytest.mark.parametrize("name", TWINS)
def test_a_rank_without_work_adds_exactly_nothing(forks, name):
    nothing = torch.zeros(1, 1, dtype=torch.bool)
    arguments = (torch.full((1, 1), -0.5), torch.full((1, 1), -0.7), torch.full((1, 1), -0.6), torch.zeros(1), nothing)
    value, gradient, _ = value_and_gradient(load_objective(name), arguments, **loss_options(resolve(name), LIMIT),
                                            denominator=8)
    assert value == 0 and (gradient == 0).all()


def test_a_modules_own_settings_are_settings_of_the_program(forks, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path), "--output", str(tmp_path / "out"),
             "--objective", "my_sapo"]
    settings = parse(Settings, [*words, "--tau_negative", "1.3"])
    assert as_dict(settings)["tau_negative"] == 1.3 and loss_options(settings.objective, LIMIT)["tau_negative"] == 1.3
    with pytest.raises(SystemExit):
        parse(Settings, [*words, "--help"])
    assert "--tau_negative" in capsys.readouterr().out
