"""A small folder in MORE's layout, written line by line."""
import json

from PIL import Image

LABELS = {"/per/org/member_of": 2, "none": 0, "/per/per/peer": 1}
SIZE = (80, 60)


def line(**changes):
    fields = {"token": ["Celtics", "beat", "Heat"], "h": {"name": "Heat", "pos": [2, 3]},
              "t": {"name": "[OBJ0]", "pos": [0.5, 0.5, 0.25, 0.5]}, "img_id": "a.png", "relation": "none"}
    return {**fields, **changes}


def box(*pos):
    return {"t": {"name": "[OBJ0]", "pos": list(pos)}}


def write_more(folder, lines, split="train", labels=LABELS):
    """A folder in MORE's layout with one image, a.png, in which every pixel has another colour."""
    (folder / "txt").mkdir(exist_ok=True)
    (folder / "img_org" / split).mkdir(parents=True, exist_ok=True)
    (folder / "rel2id.json").write_text(json.dumps(labels))
    texts = [fields if isinstance(fields, str) else repr(fields) for fields in lines]
    (folder / "txt" / f"{split}.txt").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    numbered_image().save(folder / "img_org" / split / "a.png")
    return folder


def numbered_image(size=SIZE):
    image = Image.new("RGB", size)
    image.putdata([(x, y, 7) for y in range(size[1]) for x in range(size[0])])
    return image
