"""Images of the recorded samples, small enough to lie inside the page."""

import base64
import io
from functools import cache
from pathlib import Path

from data.images import open_image

LONGEST_SIDE = 448  # pixels
MOST_BYTES = 16 * 2**20  # of all images together; further samples go without


class Images:
    """Paths → data URIs, each image once: {"src", "width", "height"}, or {"missing": why}."""

    def __init__(self):
        self.room = MOST_BYTES

    @cache
    def __call__(self, path: str) -> dict:
        if self.room <= 0:
            return {"missing": "left out: the page's room for images is used up"}
        try:
            image = open_image(Path(path))
        except (OSError, ValueError) as problem:
            return {"missing": str(problem)}
        width, height = image.size
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        # A drawing of few colours is smaller, and sharp, as PNG; a photograph as JPEG.
        few = image.getcolors(256) is not None
        buffer = io.BytesIO()
        image.save(buffer, **({"format": "PNG", "optimize": True} if few else {"format": "JPEG", "quality": 82}))
        source = f"data:image/{'png' if few else 'jpeg'};base64," + base64.b64encode(buffer.getvalue()).decode()
        self.room -= len(source)
        return {"src": source, "width": width, "height": height}
