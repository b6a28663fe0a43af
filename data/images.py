"""An image on disk: checked by its header before training, opened as RGB, cropped to a box.

Boxes are (cx, cy, w, h) in fractions of the image, centre format, as MORE stores them. Pixels are taken as they are
stored, for a dataset's boxes refer to stored pixels; `upright` turns a photograph as its EXIF orientation says."""
import logging
import math
import struct
from pathlib import Path

import numpy
from PIL import ExifTags, Image

from data.read import one_line

MISSING_IMAGES = ("stop", "drop", "blank")
log = logging.getLogger(__name__)
LONGEST_RATIO = 200  # Qwen2-VL's image processor refuses an image more elongated than 200:1
# what Pillow raises for files that are no whole images, or are none that may be opened
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
# EXIF's orientations but for 1, as it is stored; from 5 on width and height change places
TURNS = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                        Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                        Image.Transpose.ROTATE_90), 2))


def settle_missing(samples: list, names: list[str], report: str, how: str) -> list:
    """The samples, some of which have no image; names: the images, of which the first three end the `report`. "stop" is
    a FileNotFoundError, "drop" leaves such samples out, "blank" keeps them with `image` None; both warn."""
    if how not in MISSING_IMAGES:
        raise ValueError(f"missing_images is {how!r}; one of {', '.join(MISSING_IMAGES)} expected")
    if not names:
        return samples
    report = f"{report}: {', '.join(names[:3])}"
    if how == "stop":
        raise FileNotFoundError(f"{report} (missing_images can be drop or blank)")
    log.warning("%s (%s)", report, "left out" if how == "drop" else "a grey image stands in")
    return [sample for sample in samples if sample.image is not None or how == "blank"]


def check_image(path, where: str, upright: bool = False) -> tuple[int, int]:
    """(width, height) in pixels, from the header alone: milliseconds for an image of any size.

    FileNotFoundError if there is no such file, ValueError if it is no image, too elongated, or of numbers whose black
    and white are not known; `where` names the sample. That it is cut off after its header only decoding finds."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where}: image {path} is missing")
    try:
        with Image.open(path) as image:
            width, height = image.size[::-1] if upright and orientation(image) in range(5, 9) else image.size
            is_sixteen_bits(image)
    except UNREADABLE as problem:
        raise ValueError(f"{where}: image {path} cannot be read ({one_line(problem)})") from None
    if max(width, height) > LONGEST_RATIO * min(width, height):
        raise ValueError(f"{where}: image {path} is {width}x{height} pixels; at most {LONGEST_RATIO}:1 expected")
    return width, height


def open_image(path, upright: bool = False) -> Image.Image:
    """The image in RGB, white where transparent; of 16 bits the upper eight. ValueError if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            if is_sixteen_bits(image):
                values = numpy.asarray(image)
                values = numpy.where(values == image.info.get("transparency", -1), 65535, values) >> 8
                opened = Image.fromarray(values.astype(numpy.uint8)).convert("RGB")
            elif image.has_transparency_data:
                layer = image.convert("RGBA")
                opened = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
            else:
                opened = image.convert("RGB")
            turn = TURNS.get(orientation(image)) if upright else None
            return opened if turn is None else opened.transpose(turn)
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path} is missing") from None
    except UNREADABLE as problem:
        raise ValueError(f"image {path} cannot be decoded ({one_line(problem)})") from None


def upright_copy(path, folder) -> str:
    """The path itself, or that of a copy in `folder`, turned as EXIF says: tasks open pixels as they are stored."""
    try:
        with Image.open(path) as image:
            if orientation(image) not in TURNS:
                return str(path)
    except UNREADABLE:
        return str(path)  # the task has words of its own for that
    copy = Path(folder) / Path(path).name
    open_image(path, upright=True).save(copy, "PNG", exif=b"")  # else it might say once more how to turn it
    return str(copy)


def is_sixteen_bits(image: Image.Image) -> bool:
    """Whether it is grey of 16 bits. ValueError for other numbers than bytes, whose black and white no header tells."""
    if not image.mode.startswith(("I", "F")):
        return False
    # a TIFF may have 12 bits; Pillow opens PGM, and in some versions PNG, as 32-bit numbers up to 65,535
    bits = set(getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (16,)))
    if bits != {16} or not (image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")):
        raise ValueError(f"numbers of mode {image.mode}, whose black and white are not known; 8 or 16 bits expected")
    return True


def orientation(image: Image.Image) -> int:
    """EXIF's, from 1 to 8; 1, as it is stored, where there is none that can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except UNREADABLE:
        return 1


def check_box(box, size: tuple[int, int] | None, where: str) -> None:
    """ValueError, naming `where`, for a box that leaves nothing to look at; one that spills over the edge is clamped.

    `size` is (width, height) in pixels, or None where there is no image: then the shape in pixels is not checked."""
    cx, cy, w, h = box
    for wrong, fault in (
            (not all(math.isfinite(value) and abs(value) < 1e6 for value in box), "holds a value that is no fraction"),
            (w <= 0 or h <= 0, "has no area"),
            (cx - w / 2 >= 1 or cy - h / 2 >= 1 or cx + w / 2 <= 0 or cy + h / 2 <= 0, "lies outside the image")):
        if wrong:
            raise ValueError(f"{where}: box {box} {fault}; (cx, cy, w, h) in fractions expected")
    if size is not None:
        left, top, right, bottom = pixel_box(box, size)
        width, height = right - left, bottom - top
        if max(width, height) > LONGEST_RATIO * min(width, height):
            raise ValueError(f"{where}: box {box} cuts out {width}x{height} pixels; "
                             f"nothing thinner than 1:{LONGEST_RATIO} expected")


def pixel_box(box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels, clamped to `size` (width, height), at least 1 px a side."""
    edge = lambda way, axis: round((box[axis] + way * box[axis + 2] / 2) * size[axis])
    left, top = (min(max(edge(-1, axis), 0), size[axis] - 1) for axis in (0, 1))
    return left, top, min(max(edge(1, 0), left + 1), size[0]), min(max(edge(1, 1), top + 1), size[1])


def crop_box(image: Image.Image, box) -> Image.Image:
    return image.crop(pixel_box(box, image.size))


def grey_image() -> Image.Image:
    """Stands in for an image that is not at hand: 56x56, Qwen2.5-VL's smallest, four image tokens."""
    return Image.new("RGB", (56, 56), "grey")
