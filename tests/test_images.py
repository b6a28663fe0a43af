"""An image is what a person sees: 16 bits are scaled, a photo is turned where asked, what cannot be known is
refused."""

import random

import numpy
import pytest
from PIL import Image

from data import jsonl, more
from data.images import check_image, crop_box, open_image, upright_copy
from data.toy.model import write_tiny_model
from grpo import predict
from more_folder import line, write_more
from rewards import more as more_rewards

GREY = numpy.arange(48 * 64, dtype=numpy.uint16).reshape(48, 64) * 21  # 0 to 64,491
ORIENTATION = 274


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_an_image_of_16_bits_is_seen_by_its_upper_eight(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    Image.fromarray(GREY).save(path)
    assert check_image(path, "here") == (64, 48)
    seen = numpy.asarray(open_image(path))
    assert seen.shape == (48, 64, 3) and (seen == (GREY >> 8)[..., None]).all()


def test_a_transparent_grey_of_16_bits_is_white(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png", transparency=21)
    seen = numpy.asarray(open_image(tmp_path / "a.png"))
    assert seen[0, :3, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize("pixels", [GREY / numpy.float32(65535), GREY.astype(numpy.int32)], ids=["float", "32 bits"])
def test_numbers_whose_black_and_white_nobody_knows_are_refused_by_name_before_anything_runs(tmp_path, pixels):
    write_more(tmp_path, [line(img_id="b.tif")])
    path = tmp_path / "img_org" / "train" / "b.tif"
    Image.fromarray(pixels).save(path)
    with pytest.raises(ValueError,
                       match="train.txt:1: image .*b.tif cannot be read .*black and white are not known; 8 or"):
        more.load(tmp_path, "train")
    with pytest.raises(ValueError, match="image .*b.tif cannot be decoded .*black and white are not known"):
        open_image(path)


def test_a_tiff_of_12_bits_does_not_come_out_black(tmp_path):
    Image.fromarray(GREY >> 4).save(tmp_path / "a.tif")
    content = (tmp_path / "a.tif").read_bytes()
    bits = bytes.fromhex("02010300010000001000")  # BitsPerSample, one short: 16
    assert content.count(bits) == 1
    (tmp_path / "a.tif").write_bytes(content.replace(bits, bits[:-2] + b"\x0c\0"))
    with pytest.raises(ValueError, match="black and white are not known"):
        check_image(tmp_path / "a.tif", "here")


def photo(path, orientation):
    """Stored 60 × 40, the left half red."""
    image, exif = Image.new("RGB", (60, 40), "blue"), Image.Exif()
    image.paste("red", (0, 0, 30, 40))
    exif[ORIENTATION] = orientation
    image.save(path, exif=exif)


@pytest.mark.parametrize("orientation, size, red", [
    (1, (60, 40), (5, 20)), (2, (60, 40), (55, 20)), (3, (60, 40), (55, 20)), (4, (60, 40), (5, 20)),
    (5, (40, 60), (20, 5)), (6, (40, 60), (20, 5)), (7, (40, 60), (20, 55)), (8, (40, 60), (20, 55)),
    (0, (60, 40), (5, 20)), (9, (60, 40), (5, 20)),
])
def test_a_photo_is_turned_where_asked_and_kept_as_stored_where_boxes_refer_to_it(tmp_path, orientation, size, red):
    path = tmp_path / "a.png"
    photo(path, orientation)
    assert open_image(path).size == check_image(path, "here") == (60, 40) and open_image(path).getpixel((5, 20)) == (
        255,
        0,
        0,
    )
    turned = open_image(path, upright=True)
    assert turned.size == check_image(path, "here", upright=True) == size and turned.getpixel(red) == (255, 0, 0)
    (tmp_path / "copies").mkdir()
    copy = upright_copy(path, tmp_path / "copies")
    assert open_image(copy,
                      upright=True).tobytes() == turned.tobytes() and (copy == str(path)) == (orientation in (0, 1, 9))


def test_a_broken_orientation_leaves_the_photo_as_it_is(tmp_path):
    photo(tmp_path / "a.jpg", 6)
    content, draw = (tmp_path / "a.jpg").read_bytes(), random.Random(0)
    begin = content.index(b"Exif\0\0")
    for _ in range(50):
        (tmp_path / "b.jpg").write_bytes(content[: begin + 6] + draw.randbytes(20) + content[begin + 26 :])
        assert open_image(tmp_path / "b.jpg", upright=True).size in ((60, 40), (40, 60))


def test_predict_shows_a_phones_photo_upright_unless_the_box_refers_to_stored_pixels(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    write_more(tmp_path / "data", [line()])
    write_tiny_model(tmp_path / "model", ["a"], vocabulary=300, hidden=32, layers=1, heads=2, key_value_heads=1)
    photo(tmp_path / "phone.jpg", 6)
    shown = []
    monkeypatch.setattr(predict, "complete",
                        lambda settings, task, one: (shown.append(task.data.build_prompt(one)[0]), True))
    monkeypatch.setattr(more_rewards, "parse", lambda completion, one: None)
    words = ["--model", tmp_path / "model", "--data", tmp_path / "data", "--image", tmp_path / "phone.jpg",
             "--box", "0.5,0.25,1,0.5", "--text", "Celtics beat Heat", "--entity", "Heat"]
    for more_words in ([], ["--exif_orientation", "False"]):
        predict.main([*map(str, words), *more_words])
    (turned, crop), (stored, _) = shown
    assert (turned.size, stored.size) == ((40, 60), (60, 40))
    assert crop.size == (40, 30) and crop.getpixel((20, 5))[0] > 200  # the upper half, as it is seen, is red
    assert crop.tobytes() == crop_box(turned, (0.5, 0.25, 1, 0.5)).tobytes()


def test_a_file_of_questions_shows_photos_upright_unless_told_otherwise(tmp_path):
    photo(tmp_path / "phone.jpg", 6)
    (tmp_path / "q.jsonl").write_text('{"question": "Which colour is above?", "image": "phone.jpg", "answer": "red"}\n')
    turned, = jsonl.load(tmp_path / "q.jsonl", "all")
    stored, = jsonl.load(tmp_path / "q.jsonl", "all", exif_orientation=False)
    assert (turned.sizes, stored.sizes) == ([(40, 60)], [(60, 40)])
    assert [image.size for one in (turned, stored) for image in jsonl.build_prompt(one)[0]] == [(40, 60), (60, 40)]
