"""A JMERE folder of a few posts with images, for tests."""

import json

from PIL import Image

NAMES = ("Mia Stone", "Harbour FC")


def post(index: int, relation: str = "member_of") -> dict:
    tokens = [*NAMES[0].split(), "signs", "for", *NAMES[1].split(), str(index)]
    return {"token": tokens, "img_id": f"{index}.png", "label_list": [[{
        "beg_ent": {"name": NAMES[0], "pos": [0, 2], "tags": "per"},
        "sec_ent": {"name": NAMES[1], "pos": [4, 6], "tags": "org"}, "relation": relation}]]}


def write_jmere(folder, count: int = 4):
    """`count` posts in train, one in val: member_of, and peer once so that there are two relations."""
    (folder / "images").mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (40, 30), (index, 0, 0)).save(folder / "images" / f"{index}.png")
    (folder / "train.json").write_text(json.dumps([post(index) for index in range(count)]))
    (folder / "val.json").write_text(json.dumps([post(0, "peer")]))
    return folder
