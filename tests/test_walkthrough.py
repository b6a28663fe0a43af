"""docs/walkthrough.md is true: its code runs, in order, and prints what stands there; its drawings show what the code
does.

`python tests/test_walkthrough.py` (with the repository on PYTHONPATH) writes what the code prints now into the page.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "walkthrough.md"
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<printed>.*?)```\n)?", re.DOTALL)
NUMBER = re.compile(r"(?<![\w/])([+-]?\d[\d,]*(?:\.\d*)?)")


def run_page(text: str) -> tuple[list[str], dict]:
    """What each block prints, and the names that are left at the end."""
    namespace, printed = {}, []
    for block in BLOCK.finditer(text):
        output = io.StringIO()
        code = compile(block["code"], f"{PAGE}:{text.count(chr(10), 0, block.start()) + 2}", "exec")
        with contextlib.redirect_stdout(output):
            exec(code, namespace)
        printed.append(output.getvalue())
    return printed, namespace


def side_by_side(images: list[Image.Image], height: int = 224) -> numpy.ndarray:
    """The images, enlarged, with a white gap between them."""
    larger = [image.resize((round(image.width * height / image.height), height), Image.Resampling.NEAREST)
              for image in images]
    gap = numpy.full((height, 16, 3), 255, numpy.uint8)
    return numpy.concatenate([numpy.asarray(larger[0]), gap, numpy.asarray(larger[1])], 1)


def differences(expected: str, found: str) -> list[str]:
    """Words that differ; numbers may by two of their last printed digit, as another version of torch adds up
    otherwise."""
    words, other = NUMBER.split(expected), NUMBER.split(found)
    if len(words) != len(other):
        return [f"expected {expected!r}, found {found!r}"]
    wrong = []
    for i, (a, b) in enumerate(zip(words, other)):
        if i % 2 and "." in a:
            digits = len(a.partition(".")[2])
            same = abs(float(a.replace(",", "")) - float(b.replace(",", ""))) < 2.5 * 10**-digits
        else:
            same = a.split() == b.split()
        wrong += [] if same else [f"expected {a!r}, found {b!r}"]
    return wrong


def test_the_walkthroughs_code_runs_in_order_and_prints_what_stands_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    blocks = [block["printed"] for block in BLOCK.finditer(text)]
    printed, names = run_page(text)
    assert len(printed) > 10
    for expected, found in zip(blocks, printed):
        assert not differences(expected or "", found), "run python tests/test_walkthrough.py to renew the page"
    # and its sentences: the loss begins at 0 and the gradient does not, then what was good became likelier, what was
    # bad less
    assert abs(names["losses"][0]) < 1e-6 < 1e-3 < abs(names["losses"][1]) and names["norm"] > 0.1
    change = (names["after"] - names["pack"].old_logp).sum(1)
    best, worst = names["pack"].advantages.argmax(), names["pack"].advantages.argmin()
    assert change[best] > 0 > change[worst]
    assert numpy.array_equal(side_by_side(names["images"]), numpy.array(Image.open(ROOT / "docs" / "walkthrough.png")))


def test_the_comparison_sees_a_changed_word_and_a_changed_number():
    assert not differences("loss 0.123, 3 tokens", "loss 0.124, 3 tokens")
    assert differences("loss 0.123", "loss 0.133") and differences("3 tokens",
                                                                   "4 tokens") and differences("a 1.0", "b 1.0")


def test_the_drawing_of_a_packed_pass_shows_who_attends_to_whom():
    """Attention over equal keys is a mean of the values: with the identity as values a row tells what it has seen."""
    from grpo.engine.attention import Packed

    drawing = xml.parse(ROOT / "docs" / "packed-pass.svg").getroot()
    prompt, *completions = map(int, drawing.get("data-lengths").split())
    rows = prompt + sum(length - 1 for length in completions)
    drawn = {(int(cell.get("data-row")), int(cell.get("data-column"))) for cell in drawing.iter()
             if cell.get("data-row")}
    same = torch.zeros(1, 1, rows, rows)
    values = torch.eye(rows)[None, None]
    seen = Packed([(prompt, [length - 1 for length in completions])]).attend(0, same, same, values, 1.0)[0, :, 0]
    assert drawn == {tuple(place) for place in (seen > 0).nonzero().tolist()}


def renew() -> None:
    text = PAGE.read_text(encoding="utf-8")
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        printed, names = run_page(text)
        os.chdir(here)
    outputs = iter(printed)

    def block(found):
        output = next(outputs)
        return f"```python\n{found['code']}```\n" + (f"\n```text\n{output}```\n" if output else "")

    PAGE.write_text(BLOCK.sub(block, text), encoding="utf-8")
    Image.fromarray(side_by_side(names["images"])).save(ROOT / "docs" / "walkthrough.png")


if __name__ == "__main__":
    sys.exit(renew())
