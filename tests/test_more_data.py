"""The MORE reader: what it reads, what it refuses and in which words, and the prompt it makes."""
import json
import os
import random
import struct
from pathlib import Path

import pytest
from PIL import Image

from data import check, images, more
from more_folder import LABELS, SIZE, box, line, numbered_image, write_more


def test_a_line_becomes_a_sample(tmp_path):
    write_more(tmp_path, [line(), line(relation="/per/org/member_of", **box(0.1, 0.2, 0.3, 0.4))], "valid")
    first, second = more.load(tmp_path, "valid")
    assert first == more.Sample(
        id="valid/0", image=tmp_path / "img_org" / "valid" / "a.png", box=(0.5, 0.5, 0.25, 0.5),
        text="Celtics beat Heat", entity="Heat", label="none",
        labels=("none", "/per/per/peer", "/per/org/member_of"))
    assert (second.id, second.box, second.label) == ("valid/1", (0.1, 0.2, 0.3, 0.4), "/per/org/member_of")
    assert (more.is_none(first), more.is_none(second)) == (True, False)
    assert more.stratum(second) == "/per/org/member_of"
    assert more.target(second) == "<answer>/per/org/member_of</answer>"


def test_json_and_python_lines_read_the_same(tmp_path):
    fields = line(token=["It's", "\u2028", "Zoë", '"q"', "a/b"])
    escaped = json.dumps(fields).replace("/", "\\/")  # JSON may escape slashes, Python knows no such escape
    write_more(tmp_path, [repr(fields), json.dumps(fields), json.dumps(fields, ensure_ascii=False), escaped])
    texts = {sample.text for sample in more.load(tmp_path, "train")}
    assert texts == {"It's \u2028 Zoë \"q\" a/b"}


def test_a_line_without_box_takes_it_from_the_dictionary(tmp_path):
    torch = pytest.importorskip("torch")
    write_more(tmp_path, [line(t={"name": "[OBJ1]"})])
    with pytest.raises(more.BoxFault, match="train.txt:1: no box in 't', and .*_dict.pth is missing"):
        more.load(tmp_path, "train")
    boxes = {"a.png": {"[OBJ0]": (0.9, 0.9, 0.1, 0.1), "[OBJ1]": (0.4, 0.5, 0.2, 0.3)}}
    torch.save(boxes, tmp_path / "ent_train_dict.pth")
    assert more.load(tmp_path, "train")[0].box == (0.4, 0.5, 0.2, 0.3)
    numbers = torch.tensor([0.5, 0.5, 0.25, 1])
    for box_in_torch in (numbers, tuple(numbers)):
        torch.save({"a.png": {"[OBJ1]": box_in_torch}}, tmp_path / "ent_train_dict.pth")
        assert more.load(tmp_path, "train")[0].box == (0.5, 0.5, 0.25, 1)


@pytest.mark.parametrize("boxes, message", [
    ({}, "no box in 't', and ent_train_dict.pth has none for '\\[OBJ0\\]' of a.png"),
    ({"a.png": {}}, "no box in 't', and ent_train_dict.pth has none for '\\[OBJ0\\]' of a.png"),
    ({"a.png": [0.5, 0.5, 0.2, 0.2]}, "ent_train_dict.pth holds \\[0.5, .* for a.png; {object: box} expected"),
    ({"a.png": None}, "ent_train_dict.pth holds None for a.png; {object: box} expected"),
    ({"a.png": {"[OBJ0]": {"cx": 0.5}}}, "box is {'cx': 0.5}; \\(cx, cy, w, h\\) in fractions expected"),
    ([0.5], "no box in 't', and .*ent_train_dict.pth holds a list; a dict expected"),
    (None, "no box in 't', and .*ent_train_dict.pth holds a NoneType; a dict expected"),
    (b"no pickle", "no box in 't', and .*ent_train_dict.pth cannot be read"),
])
def test_a_broken_box_dictionary_is_named_for_every_line_and_read_once(tmp_path, monkeypatch, boxes, message):
    torch = pytest.importorskip("torch")
    write_more(tmp_path, [line(t={"name": "[OBJ0]"})] * 2)
    file, read, reads = tmp_path / "ent_train_dict.pth", torch.load, []
    file.write_bytes(boxes) if isinstance(boxes, bytes) else torch.save(boxes, file)
    monkeypatch.setattr(torch, "load", lambda *given, **options: reads.append(1) or read(*given, **options))
    reader = more.SplitReader(tmp_path, "train")
    for where, text in reader.lines():
        with pytest.raises(more.BoxFault, match=f"^{where}: {message}") as caught:
            reader.sample(text, where)
        assert "\n" not in str(caught.value)
    assert len(reads) == 1


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_box_dictionary_cannot_run_code(tmp_path):
    torch = pytest.importorskip("torch")
    write_more(tmp_path, [line(t={"name": "[OBJ0]"})])
    torch.save(Bomb(tmp_path / "exploded"), tmp_path / "ent_train_dict.pth")
    with pytest.raises(ValueError, match="ent_train_dict.pth cannot be read"):
        more.load(tmp_path, "train")
    assert not (tmp_path / "exploded").exists()


BROKEN_LINES = [
    (repr(line())[:50], "train.txt:2: .*one complete Python or JSON dictionary expected"),
    (json.dumps(line())[:-1], "train.txt:2: .*one complete Python or JSON dictionary expected"),
    ("[" * 5000, "train.txt:2: .*one complete Python or JSON dictionary expected"),
    ("{{'token': 1}}", "train.txt:2: .*one complete Python or JSON dictionary expected"),
    ("{[1]: 2}", "train.txt:2: .*one complete Python or JSON dictionary expected"),
    ("-" * 100000 + "1", "train.txt:2: .*one complete Python or JSON dictionary expected"),
    ("{'token': " + "-" * 3000 + "1}", "train.txt:2: .*one complete Python or JSON dictionary expected"),
    ("{'token': 0x" + "f" * 5000 + "}", "train.txt:2: 'token' is a int; a list that is not empty expected"),
    ("[1, 2]", "train.txt:2: .*one complete Python or JSON dictionary expected"),
    ("", "train.txt:2: an empty line"),
    (line(token=[]), "train.txt:2: 'token' is \\[\\]; a list that is not empty expected"),
    (line(token=["a", 1]), "train.txt:2: 'token' is .*a list of words expected"),
    (line(token="a b"), "train.txt:2: 'token' is 'a b'; a list that is not empty expected"),
    (line(h={"pos": [0, 1]}), "train.txt:2: 'h.name' is missing"),
    (line(h=3), "train.txt:2: 'h.name' is missing"),
    (line(t="[OBJ0]"), "train.txt:2: 't' is '\\[OBJ0\\]'; a dict that is not empty expected"),
    (line(img_id=""), "train.txt:2: 'img_id' is ''; a str that is not empty expected"),
    (line(img_id="../a.png"), "train.txt:2: 'img_id' is '../a.png'; the bare name of a file expected"),
    (line(img_id="a" * 252 + ".png"), "train.txt:2: 'img_id' is 'a{59}; the bare name of a file expected"),
    (line(img_id="ä" * 126 + ".png"), "train.txt:2: 'img_id' is 'ä{59}; the bare name of a file expected"),
    (line(img_id="a\nb.png"), "train.txt:2: 'img_id' is 'a.*; the bare name of a file expected"),
    (json.dumps(line(img_id="\ud83d.png")), "train.txt:2: 'img_id' is .*; the bare name of a file expected"),
    (line(relation=None), "train.txt:2: 'relation' is missing"),
    (line(relation="x" * 5000), "train.txt:2: label 'x{59} is not in .*rel2id.json"),
    (line(relation="/per/org/fan_of"), "train.txt:2: label '/per/org/fan_of' is not in .*rel2id.json"),
    (line(**box(0.5, 0.5, 0.1)), "train.txt:2: box is \\[0.5, 0.5, 0.1\\]; \\(cx, cy, w, h\\) in fractions expected"),
    (line(**box(0.5, 0.5, "a", 1)), "train.txt:2: box is .*\\(cx, cy, w, h\\) in fractions expected"),
    (line(**box(0.5, 0.5, 0, 0.1)), "train.txt:2: box .* has no area"),
    (line(**box(0.5, 0.5, 0.1, -0.1)), "train.txt:2: box .* has no area"),
    (line(**box(1.3, 0.5, 0.5, 0.1)), "train.txt:2: box .* lies outside the image"),
    (line(**box(0.5, -0.3, 0.5, 0.5)), "train.txt:2: box .* lies outside the image"),
    (line(**box(40, 30, 20, 20)), "train.txt:2: box .* lies outside the image; .* in fractions expected"),
    (line(**box(10 ** 400, 0.5, 0.1, 0.1)), "train.txt:2: box is .*in fractions expected"),
    (line(**box(0.5, 0.5, 1e308, 0.1)), "train.txt:2: box is .*in fractions expected"),
    (json.dumps(line(**box(0.5, 0.5, float("inf"), 0.1))), "train.txt:2: box is .*in fractions expected"),
    (json.dumps(line(**box(0.5, float("nan"), 0.1, 0.1))), "train.txt:2: box is .*in fractions expected"),
    (line(**box(True, True, True, True)), "train.txt:2: box is .*in fractions expected"),
    (line(t={"pos": dict.fromkeys((0.5, 0.4, 0.3, 0.2))}), "train.txt:2: box is .*in fractions expected"),
    (line(t={"pos": b"abcd"}), "train.txt:2: box is .*in fractions expected"),
]


@pytest.mark.parametrize("broken, message", BROKEN_LINES)
def test_a_broken_line_is_named_in_one_line(tmp_path, broken, message):
    write_more(tmp_path, [line(), broken, line()])
    with pytest.raises(ValueError, match=message) as caught:
        more.load(tmp_path, "train")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_lone_surrogate_is_mended(tmp_path):
    write_more(tmp_path, [json.dumps(line(token=["goal", "\ud83d"], h={"name": "go\ude00al"}))])
    sample, = more.load(tmp_path, "train")
    assert (sample.text, sample.entity) == ("goal ?", "go?al")


@pytest.mark.parametrize("labels, message", [
    ({"none": 0, "/per/\x07": 1}, "a label holds what cannot be printed, .*; found .*x07"),
    ({"none": 0, "/per/per/peer ": 1}, "a label .* begins or ends in space; found .*/peer "),
    ({"/per/per/peer": 0}, "no label 'none'; found ..?/per/per/peer"),
    ({}, "no label 'none'; found no label at all"),
    (["none"], "a dictionary from label to whole number expected"),
    ({"none": "0"}, "a dictionary from label to whole number expected"),
    ({"none": 0, "/per/per/peer": 0}, "two labels share an id"),
])
def test_a_broken_label_file_is_named(tmp_path, labels, message):
    write_more(tmp_path, [line()], labels=labels)
    with pytest.raises(ValueError, match=f"rel2id.json: {message}"):
        more.load(tmp_path, "train")


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="rel2id.json is missing"):
        more.load(tmp_path, "train")
    write_more(tmp_path, [line()])
    with pytest.raises(FileNotFoundError, match="test.txt is missing"):
        more.load(tmp_path, "test")
    with pytest.raises(ValueError, match="split is 'dev'; one of train, valid, test expected"):
        more.load(tmp_path, "dev")
    for text in ("{", "[" * 100000):
        (tmp_path / "rel2id.json").write_text(text)
        with pytest.raises(ValueError, match="rel2id.json: not JSON"):
            more.load(tmp_path, "train")


@pytest.mark.parametrize("lines", [[], ["", ""]])
def test_an_empty_dataset_is_refused(tmp_path, lines):
    write_more(tmp_path, lines)
    with pytest.raises(ValueError, match="train.txt: no samples in it"):
        more.load(tmp_path, "train")


def test_missing_images_stop_are_dropped_or_go_grey(tmp_path, caplog):
    write_more(tmp_path, [line(img_id=f"{i}.png") for i in range(4)] + [line()])
    message = "train.txt: 4 of 5 samples have no image: .*0.png, .*1.png, .*2.png \\("
    with pytest.raises(FileNotFoundError, match=message):
        more.load(tmp_path, "train")
    assert [sample.id for sample in more.load(tmp_path, "train", missing_images="drop")] == ["train/4"]
    blank = more.load(tmp_path, "train", missing_images="blank")
    assert [sample.image is None for sample in blank] == [True] * 4 + [False]
    assert "4 of 5" in caplog.text
    grey, crop = more.build_prompt(blank[0])[0]
    assert len(grey.getcolors()) == len(crop.getcolors()) == 1
    write_more(tmp_path, [line(img_id="0.png")])
    with pytest.raises(ValueError, match="no samples in it"):
        more.load(tmp_path, "train", missing_images="drop")
    with pytest.raises(ValueError, match="stop, drop, blank expected"):
        more.load(tmp_path, "train", missing_images="skip")


def test_an_unreadable_image_is_named(tmp_path):
    write_more(tmp_path, [line(img_id="b.png")])
    for content in (b"", b"no image at all", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "img_org" / "train" / "b.png").write_bytes(content)
        with pytest.raises(ValueError, match="train.txt:1: image .*b.png cannot be read") as caught:
            more.load(tmp_path, "train", missing_images="blank")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", [EOFError(), struct.error("unpack requires 4 bytes")],
                         ids=["EOFError", "struct.error"])
def test_whatever_pillow_raises_the_image_is_named(tmp_path, monkeypatch, fault):
    (tmp_path / "a.png").write_bytes(b"x")

    def refuse(path):
        raise fault

    monkeypatch.setattr(images.Image, "open", refuse)
    with pytest.raises(ValueError, match="train/0: image .*a.png cannot be read"):
        images.check_image(tmp_path / "a.png", "train/0")
    with pytest.raises(ValueError, match="image .*a.png cannot be decoded"):
        images.open_image(tmp_path / "a.png")


def test_a_cut_off_image_is_named_when_it_is_decoded(tmp_path):
    noise = Image.frombytes("RGB", SIZE, random.Random(0).randbytes(3 * SIZE[0] * SIZE[1]))
    noise.save(tmp_path / "b.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:2000])
    assert images.check_image(tmp_path / "b.jpg", "here") == SIZE
    with pytest.raises(ValueError, match="image .*b.jpg cannot be decoded"):
        images.open_image(tmp_path / "b.jpg")


def test_what_is_thinner_than_the_processor_takes_is_refused(tmp_path):
    write_more(tmp_path, [line(img_id="b.png")])
    numbered_image((402, 2)).save(tmp_path / "img_org" / "train" / "b.png")
    with pytest.raises(ValueError, match="train.txt:1: image .*b.png is 402x2 pixels"):
        more.load(tmp_path, "train")
    numbered_image((201, 80)).save(tmp_path / "img_org" / "train" / "b.png")
    write_more(tmp_path, [line(img_id="b.png", **box(0.5, 0.5, 1, 0.001))])
    with pytest.raises(ValueError, match="train.txt:1: box .* cuts out 201x1 pixels"):
        more.load(tmp_path, "train")
    numbered_image((200, 80)).save(tmp_path / "img_org" / "train" / "b.png")
    assert more.build_prompt(more.load(tmp_path, "train")[0])[0][1].size == (200, 1)


def test_the_crop_is_the_box_s_pixels(tmp_path):
    write_more(tmp_path, [line(**box(0.5, 0.4, 0.25, 0.2))])
    original, crop = more.build_prompt(more.load(tmp_path, "train")[0])[0]
    assert original.size == SIZE and original.getpixel((79, 59)) == (79, 59, 7)
    # centre 40, 24; 20 wide, 12 high
    assert crop.size == (20, 12)
    assert (crop.getpixel((0, 0)), crop.getpixel((19, 11))) == ((30, 18, 7), (49, 29, 7))


@pytest.mark.parametrize("spilling, size, corner", [
    ((0.0, 0.0, 0.5, 0.5), (20, 15), (0, 0)),  # over the left and upper edge
    ((1.0, 1.0, 0.5, 0.5), (20, 15), (60, 45)),  # over the right and lower one
    ((0.5, 0.5, 3.0, 3.0), (80, 60), (0, 0)),  # over all
    ((0.5, 0.5, 0.0001, 0.0001), (1, 1), (40, 30)),  # less than a pixel
    ((0.99999, 0.99999, 0.00001, 0.00001), (1, 1), (79, 59)),  # and that in the last corner
])
def test_a_box_that_spills_over_is_clamped_and_keeps_a_pixel(spilling, size, corner):
    images.check_box(spilling, SIZE, "here")
    crop = images.crop_box(numbered_image(), spilling)
    assert crop.size == size and crop.getpixel((0, 0)) == (*corner, 7)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_kind_of_image_opens_as_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    numbered_image().convert(mode).save(path)
    assert images.open_image(path).mode == "RGB"


def test_what_is_transparent_becomes_white(tmp_path):
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "a.png")
    assert images.open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_the_prompt_says_what_is_asked(tmp_path):
    write_more(tmp_path, [line()])
    sample = more.load(tmp_path, "train")[0]
    text = more.build_prompt(sample)[1]
    for part in ("Celtics beat Heat", "Entity: Heat", *LABELS, "per (", "org (", "loc (", "misc (",
                 "Step 1:", "Step 6:", "<think></think>", "<answer></answer>"):
        assert part in text
    plain = more.build_prompt(sample, reasoning=False)[1]
    assert "<think>" not in plain and "Step" not in plain and "<answer></answer>" in plain


def test_the_prompt_does_not_give_the_answer_away(tmp_path):
    write_more(tmp_path, [line(relation=label) for label in LABELS])
    assert len({more.build_prompt(sample)[1] for sample in more.load(tmp_path, "train")}) == 1


def test_the_expert_is_told_the_gold_answer_and_the_six_steps(tmp_path):
    write_more(tmp_path, [line(relation="/per/org/member_of"), line()])
    related, unrelated = (more.expert_prompt(sample) for sample in more.load(tmp_path, "train"))
    assert related.startswith(more.build_prompt(more.load(tmp_path, "train")[0])[1])
    for k in range(1, 7):
        assert f"\nStep {k}:" in related and f"\nStep {k}:" in unrelated
    assert "right answer is /per/org/member_of" in related and "types per and org" in related
    assert "right answer is none" in unrelated and "not related" in unrelated


@pytest.mark.parametrize("response, normalised", [
    ("<answer>per/org/member_of</answer>", "<answer>/per/org/member_of</answer>"),
    (" a <answer> per/org/member_of\n</answer> b ", "a <answer>/per/org/member_of</answer> b"),
    ("<answer>/per/org/member_of</answer>", "<answer>/per/org/member_of</answer>"),
    ("<answer>none</answer>", "<answer>none</answer>"),
    ("<answer>per/org/fan_of</answer>", "<answer>per/org/fan_of</answer>"),
    ("per/org/member_of", "per/org/member_of"),
    ("", ""),
])
def test_an_expert_s_label_gets_its_slash_back(tmp_path, response, normalised):
    write_more(tmp_path, [line()])
    assert more.normalise_response(response, more.load(tmp_path, "train")[0]) == normalised


def test_the_check_counts_and_names_everything(tmp_path, capsys):
    (tmp_path / "img_org" / "train").mkdir(parents=True)
    (tmp_path / "img_org" / "train" / "b.png").write_bytes(b"nothing")
    write_more(tmp_path, [line(), line(relation="/per/per/peer"), "{", line(img_id="gone.png"),
                          line(img_id="b.png"), line(**box(2, 2, 1, 1)), line(relation="/x/y/z")])
    write_more(tmp_path, [line()], "valid")
    write_more(tmp_path, [line()], "test")
    assert check.main("more", ["--check", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    rows = {" ".join(cells[:-3]): cells[-3:] for cells in map(str.split, printed.splitlines()) if len(cells) > 3}
    assert rows["samples"] == ["7", "1", "1"] and rows["none"] == ["4", "1", "1"]
    assert rows["/per/per/peer"] == ["1", "0", "0"] and rows["bad line"] == ["2", "0", "0"]
    assert [rows[name][0] for name in ("image missing", "image unreadable", "bad box")] == ["1", "1", "1"]
    for number, message in ((3, "dictionary expected"), (4, "gone.png is missing"), (5, "cannot be read"),
                            (6, "outside"), (7, "'/x/y/z' is not in")):
        assert any(f"train.txt:{number}: " in row and message in row for row in printed.splitlines())


def test_the_check_lives_through_every_broken_line_and_counts_box_faults_under_their_label(tmp_path):
    broken = [text for text, _ in BROKEN_LINES]
    write_more(tmp_path, [*broken, line(**box(0.5, 0.5, 0.1)), line(t={"name": "[OBJ0]"})])
    counts, offenders = check.check_split(tmp_path, "train")
    boxes = sum(" box " in message for _, message in BROKEN_LINES) + 2
    assert counts == {"samples": len(broken) + 2, "bad box": boxes, "bad line": len(broken) + 2 - boxes, "none": boxes}
    assert len(offenders) == len(broken) + 2
    write_more(tmp_path, [line(t={"name": "[OBJ0]"})])
    assert "ent_train_dict.pth is missing" in check.check_split(tmp_path, "train")[1][0]


def test_the_check_is_quiet_where_all_is_well_and_decodes_on_demand(tmp_path, capsys):
    for split in more.SPLITS:
        write_more(tmp_path, [line()], split)
    assert check.main("more", ["--check", str(tmp_path), "--decode"]) == 0
    file = tmp_path / "img_org" / "test" / "a.png"
    file.write_bytes(file.read_bytes()[:100])
    assert check.main("more", ["--check", str(tmp_path)]) == 0
    assert check.main("more", ["--check", str(tmp_path), "--decode"]) == 1
    assert "a.png cannot be decoded" in capsys.readouterr().out
    assert check.main("more", ["--check", str(tmp_path / "txt")]) == 2
    assert "error: " in capsys.readouterr().err


def test_the_check_names_ten_and_counts_the_rest(tmp_path, capsys):
    write_more(tmp_path, ["{"] * 25)
    check.main("more", ["--check", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("train.txt:") == 10 and "15 more in train" in printed


def test_the_real_sample_goes_from_disk_to_prompt():
    if "MORE_JMERE_DATA" not in os.environ:
        pytest.skip("MORE_JMERE_DATA names no folder with more-one/")
    sample, = more.load(Path(os.environ["MORE_JMERE_DATA"]) / "more-one", "train")
    (original, crop), text = more.build_prompt(sample)
    assert sample.label == "/per/misc/awarded" and "Nobel Economics Prize Goes to" in text
    assert original.size == (1200, 800) and crop.size == (136, 144)
    # A face before a dark background of hair: bright in the middle, and the same pixels as in the original.
    assert crop.getpixel((70, 75)) == original.getpixel((526 + 70, 192 + 75))
