"""JSON as other programs write it. Whatever is wrong is a ValueError of one line that names file and place.

A byte order mark is read over. Half of a surrogate pair, which JSON can spell and no tokenizer takes, becomes a "?"."""
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path


def read_json(path, expected: str, kind: type = object):
    """The file's one value. expected: what the file should hold, for the message."""
    try:
        found = json_value(Path(path).read_bytes())
    except ValueError as problem:
        raise ValueError(f"{path}: {one_line(problem)}; expected {expected}") from None
    if not isinstance(found, kind):
        raise ValueError(f"{path}: found {shown(found)}; expected {expected}")
    return found


read_object = partial(read_json, kind=dict)


def read_json_lines(path, expected: str, blank_lines: bool = False, **kinds: type) -> Iterator[tuple[str, dict]]:
    """("file:line", object) for every line. expected: what it should hold; blank_lines: or none; kinds: of fields."""
    with open(path, "rb") as file:  # its own lines: str.splitlines() would cut at U+2028 too
        for number, line in enumerate(file, 1):
            if blank_lines and not line.strip():
                continue
            try:
                entry = json_value(line)
            except ValueError as problem:
                found = f"found {line.decode(errors='replace')[:60]!r}; expected {expected} ({one_line(problem)})"
                raise ValueError(f"{path}:{number}: {found}") from None
            fits = isinstance(entry, dict) and all(isinstance(entry.get(name), kinds[name]) for name in kinds)
            if not fits:
                raise ValueError(f"{path}:{number}: found {shown(entry)}; expected {expected}")
            yield f"{path}:{number}", entry


def json_value(content: bytes):
    """ValueError for what is no JSON in UTF-8, or nested deeper than anybody writes it."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
        if b"\\ud" in content.lower():
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        return value
    except UnicodeDecodeError as problem:
        raise ValueError(f"not UTF-8: byte {problem.start + 1} is {content[problem.start]:#x}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    except ValueError as problem:
        raise ValueError(f"not JSON, perhaps cut off: {one_line(problem)[:100]}") from None


def check_folder(path, holds: str) -> None:
    """ValueError for a file where a dataset's folder is expected."""
    if Path(path).is_file():
        raise ValueError(f"{path}: a file; a folder with {holds} expected (--task jsonl reads questions from a file)")


def shown(value) -> str:
    """The beginning of a value, on one line."""
    try:
        return " ".join(repr(value).split())[:60]
    except (ValueError, RecursionError):  # Python writes no whole number of more than 4,300 digits
        return f"a {type(value).__name__}"


def one_line(problem: Exception) -> str:
    """Its message without line breaks."""
    return " ".join(str(problem).split()) or type(problem).__name__


def field(record, path: str, kind: type, where: str):
    """record["a"]["b"] for path "a.b". ValueError, naming `where`, for what is missing, of another kind, or empty."""
    value = record
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, kind) or not value:
        found = "is missing" if value is None else f"is {shown(value)}"
        raise ValueError(f"{where}: {path!r} {found}; a {kind.__name__} that is not empty expected")
    return value


def words_field(record, path: str, where: str) -> list[str]:
    words = field(record, path, list, where)
    if not all(isinstance(word, str) for word in words):
        raise ValueError(f"{where}: {path!r} is {shown(words)}; a list of words expected")
    return words


def file_name_field(record, path: str, where: str) -> str:
    """A field that is the bare name of a file, of the length that file systems allow."""
    name = field(record, path, str, where)
    if name != Path(name).name or not name.isprintable() or len(name.encode()) > 255:
        raise ValueError(f"{where}: {path!r} is {shown(name)}; the bare name of a file expected")
    return name


def fill_in(template: str, /, **values) -> str:
    """The template with {name} replaced by its value; a name that has none stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), template)


def prompt_text(name: str, **values) -> str:
    """The text of data/prompts/`name`.txt, filled in."""
    return fill_in(Path(__file__).with_name("prompts").joinpath(f"{name}.txt").read_text("utf-8").strip(), **values)
