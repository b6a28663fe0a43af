"""The report in a real headless Chromium, and what it is made of."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import browser as chromium
import pytest
from PIL import Image

from grpo.report.__main__ import main, write
from grpo.report.page import as_json
from grpo.report.read import find_runs, read_lines, read_run, short_names, spread
from grpo.report.serve import server
from grpo.runtime.settings import run_program

ROOT = Path(__file__).parent.parent
HOSTILE = ["</script><script>window.broken = 1</script>", "<img src=x onerror='window.broken = 2'>", "<!--<script>",
           "</title>", "{{DATA}}"]


def completion(advantage, words, **more):
    pieces = [f" {word}" for word in words.split()]
    count = len(pieces)
    return {"text": "".join(pieces), "pieces": pieces, "finished": True,
            "parts": {"format": 1.0, "answer": float(advantage > 0)}, "reward": 1.0 + (advantage > 0),
            "advantage": advantage, "logp": [-0.1] * count, "ref_logp": [-0.2] * count,
            "ratio": [1.0 + 0.01 * i for i in range(count)], **more}


def group(name, image=None, **more):
    words = "<think> Step 1: red. Step 2: blue. </think> <answer>none</answer>"
    return {"id": name, "prompt": "What?", "target": "<answer>none</answer>", "images": [str(image)] if image else [],
            "box": [0.5, 0.5, 0.2, 0.2], "text": "Ravens beat Wolves", "entity": "Wolves",
            "completions": [completion(a, words) for a in (-0.5, 1.2, 0.3)], **more}


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder, steps=40, records=(1, 11, 21), groups=None, **settings):
    """A GRPO run as grpo.train leaves it, without training."""
    folder.mkdir(parents=True)
    Image.new("RGB", (60, 40), "orange").save(folder / "image.png")
    lines = [{"step": 0, "valid/f1": 0.5}]
    lines += [{"step": i, "epoch": (i - 1) // 20, "reward": 1 + i / steps,
               "kl": {3: None, 2500: 1.0, 3000: -1.0}.get(i, 0.01 * (i % 7)), "step_time": 1.5}
              | ({"valid/f1": 0.5 + i / 100} if i % 10 == 0 else {}) for i in range(1, steps + 1)]
    write_lines(folder / "metrics.jsonl", lines)
    groups = groups or [group("train/1", folder / "image.png"), group("train/2", "/nowhere/gone.png")]
    write_lines(folder / "rollouts.jsonl", [{"step": step, "epoch": 0, "groups": groups} for step in records])
    write_lines(folder / "curriculum.jsonl",
                [{"epoch": 0, "hard": 20, "easy": 20}, {"epoch": 1, "hard": 20, "easy": 10}])
    what = {"settings": {"learning_rate": 1e-6, "seed": 0} | settings, "versions": {"torch": "2.13"}, "commit": "abc",
            "data_hash": "d" * 16}
    (folder / "settings.json").write_text(json.dumps(what))
    return folder


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_last_line_without_its_end_is_left_for_later_and_a_broken_one_is_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "rew\n{"step": 3}\n{"step": 4}')
    warnings = []
    assert [line["step"] for line in read_lines(path, warnings)] == [1, 3]
    assert len(warnings) == 1 and "metrics.jsonl:2" in warnings[0]


def test_columns_have_a_value_a_line_and_the_curriculums_ratio_by_epoch(tmp_path):
    run = read_run(write_run(tmp_path / "run"), "run")
    assert {len(values) for values in run.columns.values()} == {41} and run.kind == "GRPO"
    assert run.columns["curriculum/easy_per_hard"][1] == 1 and run.columns["curriculum/easy_per_hard"][-1] == 0.5
    assert run.columns["kl"][3] is None and run.columns["reward"][40] == 2


def test_a_run_that_has_written_nothing_but_its_settings_is_a_page_too(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text("{}")
    assert "No metrics yet" in write([str(tmp_path / "run")], None).read_text()


def test_a_folder_of_runs_stands_for_all_of_them_and_their_names_tell_them_apart(tmp_path):
    for name in ("a/grpo", "b/grpo", "b/sft"):
        write_run(tmp_path / name, steps=1)
    folders = find_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert short_names(folders) == ["a/grpo", "b/grpo", "sft"]


def test_what_is_left_out_of_a_full_page_is_spread_over_the_run():
    records = [{"step": step, "groups": "x" * 1000} for step in range(33)]
    steps = [record["step"] for record in spread(records, 10_000)]
    assert steps[0] == 0 and steps[-1] == 32 and len(steps) == 9 and max(b - a for a, b in zip(steps, steps[1:])) == 4


def test_another_programs_record_does_not_break_the_page(tmp_path):
    folder = write_run(tmp_path / "run")
    strange = [{"step": 1, "groups": [{"id": 3}]}, {"step": 2}, {"step": 4, "groups": [group("train/9", box=[1])]},
               {"step": 5, "groups": [group("train/9", text=5)]},
               {"step": 6, "groups": [group("train/9", completions=[])]}, {"step": 7, "groups": {}},
               {"step": 8, "groups": [group("train/9", completions=[completion(0.5, "no") | {"pieces": "no"}])]}]
    write_lines(folder / "rollouts.jsonl", [*strange, {"step": 3, "groups": [group("train/9")]}])
    assert [record["step"] for record in read_run(folder, "run").rollouts] == [3]


@pytest.mark.parametrize("words,expected",
                         [(["nowhere"], "nowhere: no such folder"), (["{empty}"], "no metrics.jsonl"), ([], "RUN"),
                                            (["{empty}", "--outptu", "x"], "--outptu")])
def test_bad_words_end_in_one_line(tmp_path, capsys, words, expected):
    with pytest.raises(SystemExit) as end:
        run_program(lambda: main([word.replace("{empty}", str(tmp_path)) for word in words]))
    errors = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: ") and expected in errors[0]


def test_no_text_can_end_the_script_element_that_holds_the_data():
    assert "<" not in as_json({"text": HOSTILE}) and json.loads(as_json({"text": HOSTILE})) == {"text": HOSTILE}


def test_the_report_needs_no_torch(tmp_path):
    write_run(tmp_path / "run", steps=2)
    code = ("import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
            f"from grpo.report.__main__ import main; main([{str(tmp_path / 'run')!r}])")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert done.returncode == 0 and "report.html" in done.stdout, done.stderr


# ── served ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def served(tmp_path):
    folder = write_run(tmp_path / "run")
    with server([str(folder)], 0) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{http.server_port}/"
        http.shutdown()


def get(address, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as reply:
        return reply.read().decode()


def test_the_server_sends_only_what_is_new(served):
    folder, address = served
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "reward": 3.0, "new": 1}\n{"step": 42, "rew')
    known = urllib.request.quote(json.dumps([{"name": "run", "lines": 41, "recorded": 11}]))
    run = json.loads(get(address + "news?known=" + known))["runs"][0]
    assert (
        run["columns"]["step"] == [41]
        and run["columns"]["new"] == [1]
        and [record["step"] for record in run["rollouts"]] == [21]
    )
    known = urllib.request.quote(json.dumps([{"name": "run", "lines": 99, "recorded": 11}]))
    assert json.loads(get(address + "news?known=" + known)) == {"restart": True}


def test_the_server_waits_for_a_run_that_is_not_there_yet(tmp_path):
    words = [str(tmp_path / "run"), str(tmp_path / "<later>")]
    with server(words, 0) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{http.server_port}/"
        page = get(address)
        assert "Waiting for" in page and "&lt;later&gt;" in page and 'http-equiv="refresh"' in page
        write_run(tmp_path / "run")
        assert "Waiting for" not in (page := get(address)) and '"name":"run"' in page
        known = urllib.request.quote(json.dumps([{"name": "run", "lines": 41, "recorded": 21}]))
        assert "restart" not in json.loads(get(address + "news?known=" + known))
        write_run(tmp_path / "<later>")
        assert json.loads(get(address + "news?known=" + known)) == {"restart": True}
        http.shutdown()


def test_the_server_answers_on_loopback_to_its_own_name_only(served):
    _, address = served
    assert "http://127.0.0.1" in address and "<title>" in get(address)
    for bad in ({"Host": "evil.example"}, {"Host": "evil.example:" + address.rsplit(":")[-1].strip("/")}):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            get(address, **bad)
    for path in ("news", "news?known=[1]", "news?known=x"):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            get(address + path)


# ── in a browser ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    if not (chromium.CHROMIUM and chromium.DRIVER):
        pytest.skip(chromium.MISSING)
    window = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield window
    window.close()


@pytest.fixture
def opened(window, tmp_path):
    """Opens the report of some runs from disk; afterwards the console must have been silent."""
    def open_report(*folders):
        window.look_like(1200, 900)
        window.open(write([str(folder) for folder in folders], tmp_path / "report.html").as_uri())
        return window
    window.errors()
    yield open_report
    assert window.errors() == []


def chart(metric, run="run"):
    return f"document.querySelector('[data-metric=\"{metric}\"] path.line[data-run=\"{run}\"]')"


def test_the_page_opens_from_disk_and_its_curves_have_a_point_an_update(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"))
    points = lambda metric: int(page.run(f"return {chart(metric)}.dataset.points"))
    assert (points("reward"), points("kl"), points("valid/f1"), points("curriculum/easy_per_hard")) == (40, 39, 5, 40)
    assert page.run(f"return {chart('reward')}.getAttribute('d').split('L').length") == 40
    assert "Constant: A step 1.500" in page.run("return document.body.innerText")
    for word in ("abc", "dddddddd", "learning_rate", "2.13"):
        assert word in page.run("return document.body.innerText")


def test_several_runs_lie_on_top_of_each_other_and_the_legend_hides_one(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"), write_run(tmp_path / "other", steps=20, learning_rate=2e-6))
    count = "return document.querySelectorAll('[data-metric=reward] path.line').length"
    assert page.run(count) == 2
    page.run("document.querySelectorAll('#legend button')[1].click()")
    assert page.run(count) == 1 and page.run(f"return !!{chart('reward')}")
    table = page.run("return document.querySelector('table.settings').innerText")
    assert "learning_rate" in table and "seed" not in table  # only what differs
    page.run("document.querySelector('#what-ran input').click()")
    assert "seed" in page.run("return document.querySelector('table.settings').innerText")


def evaluation(folder, f1, **settings):
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"f1": f1, "samples": 12}))
    what = {"settings": {"task": "more", "split": "test", **settings}, "data_hash": "d" * 16}
    (folder / "settings.json").write_text(json.dumps(what))
    return folder


def test_evaluations_of_other_samples_stand_in_a_table_of_their_own_with_their_own_best(opened, tmp_path):
    page = opened(evaluation(tmp_path / "a", 0.5), evaluation(tmp_path / "b", 0.6),
                  evaluation(tmp_path / "c", 0.9, split="valid"), evaluation(tmp_path / "d", 0.8, split="valid"),
                  evaluation(tmp_path / "e", 0.7, limit=12))
    tables = page.run(
        "return [...document.querySelectorAll('table.evaluations')].map(t => "
        "[t.parentElement.getAttribute('aria-label'), "
        "[...t.querySelectorAll('tbody th')].map(h => h.innerText), [...t.querySelectorAll('.best')].map(b => "
        "b.innerText)])"
    )
    assert tables == [["Evaluations: test", ["a", "b"], ["0.600"]], ["Evaluations: valid", ["c", "d"], ["0.900"]],
                      ["Evaluations: test, the first 12", ["e"], []]]


def test_the_cursor_shows_values_under_the_pointer_and_by_keys(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"))
    value = "document.querySelector('[data-metric=reward] .value').textContent"
    assert page.run(f"return {value}") == "2"
    page.run("document.querySelector('[data-metric=kl] .plot').focus()")
    page.press("\ue011")  # Home
    page.press("\ue014" * 10)  # ten times to the right: steps 0 → 10
    page.wait(f"{value} === '1.250'")  # every chart follows
    assert page.run("return document.activeElement.getAttribute('aria-valuetext')") == "step 10: 0.0300"
    place = page.run(
        "const r = document.querySelector('[data-metric=reward] .plot').getBoundingClientRect(); scrollTo({ top: "
        "r.top, behavior: 'instant' }); "
        "const s = document.querySelector('[data-metric=reward] .plot').getBoundingClientRect(); return [s.right - "
        "10, s.top + 50]"
    )
    move = {"type": "pointerMove", "duration": 0, "x": round(place[0]), "y": round(place[1])}
    page.ask("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})
    page.wait(f"{value} === '2'")


def test_five_thousand_steps_are_drawn_by_the_pixel(opened, tmp_path):
    page = opened(write_run(tmp_path / "run", steps=5000))
    drawn, points, width = page.run(
        f"const p = {chart('reward')}; return [+p.dataset.drawn, +p.dataset.points, p.closest('svg').clientWidth]"
    )
    assert points == 5000 and width <= drawn <= 4 * width
    raw = page.run(
        "return document.querySelector('[data-metric=kl] path.raw').getAttribute('d').match(/ [0-9.]+/g).map(Number)"
    )
    assert min(raw) < 25 and max(raw) > 110  # no single peak is lost
    seconds = page.run("const start = performance.now(); drawCharts(); return (performance.now() - start) / 1000")
    assert seconds < 2


def test_the_browser_moves_between_samples_and_steps_by_keyboard(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"))
    where = lambda: page.run("return document.getElementById('where').textContent")
    assert where().startswith("1 of 6 · step 1, epoch 1 · train/1")
    page.press("j")
    assert where().startswith("2 of 6 · step 1") and where().endswith("train/2")
    page.press("\ue014")  # right
    assert where().startswith("3 of 6 · step 11")
    page.press("\ue015")  # down
    assert where().startswith("5 of 6 · step 21")
    page.press("k\ue013")  # back, up
    assert where().startswith("2 of 6")
    assert page.run("return document.querySelectorAll('.card details[open]').length") == 0
    page.press("u")
    assert page.run("return document.querySelectorAll('.card details[open]').length") == 6


def test_completions_stand_by_advantage_with_steps_parts_and_tinted_tokens(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"))
    assert page.run("return [...document.querySelectorAll('.advantage')].map((e) => e.textContent)") == [
        "+1.200",
        "+0.300",
        "−0.500",
    ]
    assert page.run("return [...document.querySelectorAll('.card:first-child .chip')].map((e) => e.innerText)") == [
        "format 1",
        "answer 1",
    ]
    assert page.run(
        "return [...document.querySelectorAll('.card:first-child .line')].map((e) => e.innerText.trim())"
    ) == ["Step 1: red.", "Step 2: blue."]
    assert (
        page.run("return [...document.querySelectorAll('.card:last-child .t')].at(-1).className") == "t down"
    )  # a ratio above 1, A below 0
    strength = ("return [...document.querySelectorAll('.card:first-child .t')]."
                "map((e) => parseInt(e.style.getPropertyValue('--strength') || 0))")
    assert (
        page.run(strength)[0] == 0 and page.run(strength) == sorted(page.run(strength)) and page.run(strength)[-1] == 85
    )
    assert page.run("return document.querySelector('.text mark').textContent") == "Wolves"
    box = page.run("const b = document.querySelector('rect.box').getBBox(); return [b.x, b.y, b.width, b.height]")
    assert box == pytest.approx([24, 16, 12, 8])
    page.run("document.querySelector('.card .tokens').focus()")
    page.press("\ue014\ue014\ue014")
    assert "1.0200" in page.run("return document.getElementById('tip').innerText")


def test_hostile_completions_do_not_run_and_are_shown_as_text(opened, tmp_path):
    words = [completion(1.0 - i, text) for i, text in enumerate(HOSTILE)]
    bad = group(HOSTILE[1], completions=words, text=" ".join(HOSTILE), entity=HOSTILE[0], prompt=HOSTILE[0],
                target=HOSTILE[1], images=["</script><img src=x onerror='window.broken = 3'>.png"])
    page = opened(write_run(tmp_path / "run", groups=[bad], model=HOSTILE[0]))
    page.press("u")
    time.sleep(0.3)
    assert page.run("return window.broken === undefined")
    shown = page.run("return [...document.querySelectorAll('.tokens')].map((e) => e.textContent.trim())")
    assert shown == [" ".join(text.split()) for text in HOSTILE]
    assert HOSTILE[0] in page.run("return document.querySelector('table.settings').innerText")
    assert page.run("return document.querySelectorAll('img').length") == 0


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_overflows_by_day_or_night_on_a_phone_or_a_desk(opened, tmp_path, width, dark):
    long = group("train/1", completions=[completion(1.0, "x" * 300)], text="y" * 200, target="z" * 200)
    page = opened(write_run(tmp_path / "run", groups=[long], model="/a/very/long/path" * 9),
                  write_run(tmp_path / ("b" * 60)))
    page.look_like(width, 844, dark)
    page.run("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.run("return document.documentElement.scrollWidth") <= width
    paper = page.run("return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (max(paper) < 60) == dark


def test_live_a_growing_run_grows_on_the_screen_and_the_place_is_kept(window, served):
    folder, address = served
    window.errors()
    window.look_like(1200, 900)
    window.open(address)
    window.run("document.documentElement.style.scrollBehavior = 'auto'")
    window.press("jj")
    where = ("return [document.getElementById('where').textContent.split(' · ').slice(1).join(), "
             "Math.round(document.getElementById('group').getBoundingClientRect().top)]")
    place = window.run(where)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "reward": 3.0, "fresh": 1}\n{"step": 42, "reward": 3.0, "fresh": 2}\n')
    with (folder / "rollouts.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, "epoch": 1, "groups": [group("train/8")]}) + "\n")
    window.wait(f"{chart('reward')}.dataset.points === '42' && document.querySelector('[data-metric=fresh]')")
    assert "of 7" in window.run("return document.getElementById('where').textContent")
    assert window.run(where) == place
    assert window.errors() == []
