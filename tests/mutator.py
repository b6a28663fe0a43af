"""Seeded mutations of valid files: what typing, editors, exports, cut-off copies and other programs do to them."""

import copy
import json
import random

NASTY = [None, True, False, 0, -1, 3, 10**400, 1e308, float("nan"), float("inf"), "", " ", "\n", "a\nb", "\x00",
         "\ud83d", "\u2028", "\ufeff", "<|im_end|>", "yes", "../../etc", "x" * 5000, "ä" * 300, "RT", "none", [], [[]],
         {}, [None], {"a": 1}, ["a"], [1, 2], [0.5] * 4]
BYTES = [b"", b"\x00", b"\xff", b"\xc3", b"\xed\xa0\xbd", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n", b"\n\n", b"\\", b'"',
         b"'", b"{", b"}", b"[", b"]", b",", b":", b" ", b"\t", b"nan", b"-", b"1e999", b"9" * 5000, b"[" * 20000,
         b'{"a":' * 5000, b"(" * 500, b"\\ud83d", b"\xe2\x80\xa8", b"#", b"null", b"True"]


def places(value, path=()):
    """The paths of all that stands in a JSON value, itself included."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from places(one, (*path, key))


def mutate_value(value, draw: random.Random):
    """One thing in a JSON value is replaced, removed, renamed, doubled or put into a list."""
    value = copy.deepcopy(value)
    path = draw.choice(list(places(value)))
    if not path:
        return draw.choice(NASTY)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, kind = path[-1], draw.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[str(key) + draw.choice(["s", " ", "_"])] = parent.pop(key)
    elif kind == 1:
        parent.insert(key, copy.deepcopy(parent[key]))
    elif kind == 2:
        parent[key] = [parent[key]]
    elif kind == 3:
        parent[key] = str(parent[key])
    else:
        parent[key] = draw.choice(NASTY)
    return value


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bytes are cut out, put in, doubled, changed, cut off; lines change places; a BOM, other line ends, another
    encoding."""
    kind = draw.randrange(9)
    start = draw.randrange(len(content) + 1)
    end = min(len(content), start + draw.choice([1, 1, 1, 2, 5, 30]))
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + content[end:]
    if kind in (2, 3):
        return content[:start] + draw.choice(BYTES) + content[end if kind == 3 else start :]
    if kind == 4:
        return content[:end] + content[start:]
    if kind == 5:
        return content[:start] + bytes([draw.randrange(256)]) + content[start + 1 :]
    if kind == 6:
        lines = content.splitlines(keepends=True)
        draw.shuffle(lines)
        return b"".join(lines)
    if kind == 7:
        return b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")
    return content.decode("utf-8", "replace").encode(draw.choice(["utf-16", "utf-8-sig", "latin-1"]), "replace")


def mutations(valid, count: int, how: str, seed: int = 0):
    """`count` files with one mutation or two: the values of `valid` as JSON "lines", or `valid` "whole" as one
    value."""
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        written, changed = list(valid) if how == "lines" else [valid], draw.random() < 0.5
        if changed:
            one = draw.randrange(len(written))
            written[one] = mutate_value(written[one], draw)
        content = b"".join(json.dumps(value).encode() + b"\n" for value in written)
        if not changed or draw.random() < 0.2:
            content = mutate_bytes(content, draw)
        yield content
