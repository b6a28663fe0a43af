"""./launch.sh check: green on this machine, and red, with what to do, wherever a fast path is broken."""

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import check, check_paths, gpu, rates
from benchmarks.check_paths import PATHS, FastPath, Found, Stock, Subject, write_checked
from grpo.engine import attention, decode, head, lean, lora, split_group
from grpo.engine.rollout import Rollout
from grpo.engine.weights import load_policy
from grpo.runtime import checkpoints
from emulated import apart, emulated, move
from processes import run_processes


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    place = tmp_path_factory.mktemp("check")
    write_checked(place / "model")
    return Subject(place, torch.device("cpu"))


@pytest.fixture
def attempt(subject, tmp_path):
    """A function of paths' names: their lines."""
    subject.place = tmp_path

    def tried(*names) -> dict[str, check.Checked]:
        check.start()
        return {
            path.name: check.attempt(path, subject)
            for path in check.chosen(list(names), subject.device, "float32")
        }

    return tried


def test_every_fast_path_is_as_its_plain_form(attempt):
    every = attempt("paths")
    assert list(every) == [path.name for path in PATHS]
    assert all(checked.ok and checked.found for checked in every.values()), check.outcome(list(every.values()))


def test_a_run_its_checkpoint_and_its_resume_are_tried_and_on_a_cpu_nothing_differs_by_a_bit(attempt):
    every = attempt("run")
    assert [(one.what, one.differs) for one in every["run, checkpoint, resume"].found[1:]] == [
        ("read back", 0.0),
        ("resumed", 0.0),
    ]
    assert every["run, checkpoint, resume"].ok


def sees_too_much(self, rows, columns, like):
    return like.new_zeros(rows, columns)


def weighs_both_alike(*arguments):
    out, lse = partial_attention(*arguments)
    return out, torch.zeros_like(lse)


def keeps_every_guess(self, row, drawn):
    row.tokens += [token for token in row.guess] + [int(drawn[-1][0])]
    row.logps += [logp for _, logp in drawn]
    self.speculation and self.speculation.observe(row, len(drawn))
    return len(drawn)


def wrong_gradient(ctx, grad):
    gate, up = ctx.saved_tensors[:2]
    return grad @ ctx.saved_tensors[2] * up, grad @ ctx.saved_tensors[2] * gate, None, None


BROKEN = {  # what is broken: (where, attribute, by what, the paths that must be red, one that must stay green)
    "a completion sees its own future": (
        attention.Packed,
        "_lower_right",
        sees_too_much,
        ["packed pass", "attention in a pack"],
        "head in tiles",
    ),
    "decoding weighs prompt and suffix alike": (
        decode,
        "partial_attention",
        weighs_both_alike,
        ["decoding, one prefill"],
        "packed pass",
    ),
    "every guess is kept": (Rollout, "keep", keeps_every_guess, ["speculation"], "decoding, one prefill"),
    "the head's weights lose a tile's gradient": (
        head,
        "accumulate",
        lambda total, a, b, sign=1: total.addmm_(a, b, alpha=sign) if sign > 0 else None,
        ["head in tiles", "packed pass"],
        "lean norm and MLP",
    ),
    "the MLP's gradient is another": (
        lean.GatedLinear,
        "backward",
        staticmethod(wrong_gradient),
        ["lean norm and MLP"],
        "attention in a pack",
    ),
    "an adapter counts twice": (
        lora.LoraLinear,
        "forward",
        lambda self, x: torch.nn.functional.linear(
            x, self.weight + 2 * self.scale * self.on * self.lora_B @ self.lora_A, self.bias
        ),
        ["LoRA"],
        "packed pass",
    ),
    "the prompt of parts does not learn": (
        split_group.SharedPrompts,
        "backward",
        lambda self: None,
        ["group in several passes"],
        "packed pass",
    ),
    "the KL has the other sign": (
        check_paths,
        "grpo_loss",
        lambda *a, beta, **more: grpo_loss(*a, beta=-beta, **more),
        ["objective"],
        "head in tiles",
    ),
}
grpo_loss, partial_attention = check_paths.grpo_loss, decode.partial_attention


@pytest.mark.parametrize("what", BROKEN)
def test_a_fast_path_that_is_broken_is_red_and_no_other(attempt, monkeypatch, what):
    where, name, by, red, green = BROKEN[what]
    monkeypatch.setattr(where, name, by)
    every = attempt(*red, green)
    assert [path for path, checked in every.items() if not checked.ok] == red, check.outcome(list(every.values()))
    said = check.outcome(list(every.values()))
    assert f"{len(red)} of {len(every)} are not as they should be" in said and "DIFFERS" in said
    off = next(path.off for path in PATHS if path.name == red[0])
    assert (f"{off} turns it off" if off else "No setting turns it off") in said


def test_a_checkpoint_that_loses_a_bit_is_red(attempt, monkeypatch):
    read = checkpoints.read_parts

    def damaged(paths, policy, *more):
        read(paths, policy, *more)
        with torch.no_grad():
            policy.model.lm_head.weight.view(-1)[0] += 1e-6

    monkeypatch.setattr(checkpoints, "read_parts", damaged)
    checked = attempt("run")["run, checkpoint, resume"]
    assert not checked.ok and {one.what for one in checked.found if not one.fits} >= {"read back"}


@pytest.mark.parametrize("measured,green", [(95e6, True), (80e6, False), (125e6, False)])
def test_a_plan_that_is_far_from_the_measured_peak_is_red_and_both_are_said(attempt, monkeypatch, measured, green):
    monkeypatch.setattr(check, "write_model", lambda folder, shape: folder)
    monkeypatch.setattr(check.plan_check, "planned", lambda *_: SimpleNamespace(peak=100e6))
    monkeypatch.setattr(check.plan_check, "measure_apart", lambda *_: measured)
    checked = attempt("memory")["memory"]
    said = check.outcome([checked])
    assert checked.ok == green and checked.found[0].differs == pytest.approx(abs(100e6 / measured - 1))
    both = f"(100 MB planned, {measured / 1e6:.0f} measured)"
    assert green or f"{both}. grpo.plan is wrong here: leave it more --spare." in said


@pytest.mark.heavy
def test_the_planned_peak_of_a_real_step_is_the_measured_one(attempt):
    assert attempt("memory")["memory"].ok


def test_the_peak_of_a_gpu_is_of_a_step_of_the_trainer_after_a_small_one(monkeypatch, subject):
    said = []
    monkeypatch.setattr(check.plan_check, "prepare", lambda models, case, place: (models.name, case.prompt))
    monkeypatch.setattr(check.plan_check, "step", lambda *ready: said.append(ready))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: said.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 700)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    case = check.plan_check.CASES["bfloat16"]
    assert check.measured_here(Path("models"), case, subject) == 300
    assert said == [("small", 60), "reset", ("planned", case.prompt)]


def test_what_raises_is_red_by_its_message_and_what_comes_after_it_is_tried(subject, capsys):
    def raises(_):
        raise RuntimeError("CUDA error: no kernel image is available\nand more")

    check.start()
    broken = check.attempt(FastPath("kernels", "none", "--speculate off", raises), subject)
    differs = lambda by: lambda s: [Found("values", by, 0.5, "nats", "so")]
    good = check.attempt(FastPath("other", "none", "", differs(0.5)), subject)
    nan = check.attempt(FastPath("third", "none", "", differs(float("nan"))), subject)
    said = check.outcome([broken, good, nan])
    assert "kernels: RuntimeError: CUDA error: no kernel image is available. --speculate off turns it off." in said
    assert (broken.ok, good.ok, nan.ok) == (False, True, False) and "2 of 3 are not as they should be" in said


def run_main(monkeypatch, *words) -> int:
    monkeypatch.setattr("sys.argv", ["check", *map(str, words)])
    try:
        check.main()
    except SystemExit as end:
        return end.code
    return 0


def test_the_program_says_device_and_versions_and_its_status_is_the_verdict(monkeypatch, tmp_path, capsys):
    words = ["--only", "objective", "head in tiles", "--json", tmp_path / "check.json"]
    assert run_main(monkeypatch, *words) == 0
    said, content = capsys.readouterr().out, json.loads((tmp_path / "check.json").read_text())
    assert torch.__version__ in said and "commit" in said and "all 2 are as they should be" in said and content["ok"]
    assert [one["name"] for one in content["checks"]] == ["objective", "head in tiles"]
    monkeypatch.setattr(check_paths, "grpo_loss", BROKEN["the KL has the other sign"][2])
    assert run_main(monkeypatch, *words) == 1
    assert not json.loads((tmp_path / "check.json").read_text())["ok"]


def test_rates_that_cannot_be_measured_lose_nothing_of_the_table(monkeypatch, capsys):
    def no_memory(*_):
        raise RuntimeError("no memory for a large product")

    monkeypatch.setattr(rates, "measure", no_memory)
    assert run_main(monkeypatch, "--only", "objective", "rates") == 1
    said = capsys.readouterr().out
    assert "all 1 are as they should be" in said and "rates: RuntimeError: no memory for a large product" in said


def test_a_part_that_there_is_not_is_named(monkeypatch):
    with pytest.raises(ValueError, match="--only pats: expected some of paths, run, memory, rates, packed pass"):
        run_main(monkeypatch, "--only", "pats")


def test_the_rates_are_those_that_the_planner_takes(monkeypatch, tmp_path, subject):
    from grpo.plan.__main__ import Settings, with_rates

    monkeypatch.setattr(rates, "REPEATS", 1)
    monkeypatch.setitem(rates.SIZES, "cpu", (1, 540, 3))
    monkeypatch.setitem(rates.LAYERS, "cpu", gpu.SHAPES["tiny"])
    check.start()
    measured = rates.measure(torch.device("cpu"))
    (tmp_path / "rates.json").write_text(json.dumps(measured))
    s = with_rates(Settings(model="m", rates=str(tmp_path / "rates.json")))
    assert {name: getattr(s, name) for name in measured["rates"]} == measured["rates"]
    assert set(measured["rates"]) == {"tflops", "efficiency", "bandwidth", "memory_efficiency"}
    assert all(value > 0 for value in measured["rates"].values()) and measured["microseconds_of_a_launch"] > 0


def on_two_ranks():
    import tempfile
    from pathlib import Path

    from grpo.runtime.dist import broadcast_from_rank_0, rank

    place = Path(broadcast_from_rank_0(tempfile.mkdtemp))
    broadcast_from_rank_0(lambda: write_checked(place / "model") and None)
    subject = Subject(place, torch.device("cpu"))
    for path in check.chosen(["sharded weights", "run", "memory"], subject.device, "float32"):
        checked = check.attempt(path, subject)
        assert checked.ok and bool(checked.found) == (path.name != "memory"), checked
    lies = FastPath("one rank's", "none", "", lambda s: [Found("values", float(rank()), 0.5, "nats", "so")])
    assert check.attempt(lies, subject).found[0].differs == 1.0
    assert rates.gathered(torch.device("cpu")) > 0


def test_two_ranks_try_their_sharding_too_and_what_one_finds_all_tell():
    run_processes(on_two_ranks, 2)


class Moved(Subject):
    """On the emulated device: a module's `to` is not enough, and stock transformers' forward reads it where it
    cannot."""

    def policy(self):
        policy = load_policy(str(self.folder))
        policy.vocabulary = check_paths.VOCABULARY
        return move(policy, self.device)

    def stock(self, folder=None):
        return move(Stock.from_pretrained(str(self.folder), attn_implementation="eager").eval(), self.device)

    def plain(self, model, backwards=True):
        on_cpu = Subject(self.place, torch.device("cpu"))
        logp, grads = on_cpu.plain(on_cpu.stock(), backwards)
        return logp.to(self.device), {name: grad.to(self.device) for name, grad in grads.items()}


@apart
def test_fast_paths_are_tried_on_a_device_that_is_not_the_cpu():
    place = Path(tempfile.mkdtemp())
    write_checked(place / "model")
    check.start()
    with emulated() as device:
        left_out = ("bfloat16", "LoRA",
                    "gradient checkpointing")  # transformers, FSDP and autocast do not know the device
        every = [check.attempt(path, Moved(place, device)) for path in PATHS if path.name not in left_out]
    shutil.rmtree(place)
    assert all(checked.ok and checked.found for checked in every), check.outcome(every)
