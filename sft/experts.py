"""An expert behind an OpenAI-compatible endpoint: many requests at a time, each answer on disk as it comes.

The endpoint is read from the environment: OPENAI_BASE_URL (OpenAI's own where it is not set) and
OPENAI_API_KEY, which stands in no message and no file. An answer is appended to a JSONL file before anything
else is done with it; who starts again goes on behind the last one and pays for nothing twice."""
import base64
import hashlib
import http.client
import io
import json
import math
import os
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from pathlib import Path

from data.read import json_value
from grpo.runtime.log import progress, say

LONGEST_SIDE = 1536  # pixels sent; the big endpoints scale down to less
LARGEST_REPLY = 16 * 2 ** 20  # bytes
LONGEST_PAUSE = 60.0  # seconds


class TryAgain(Exception):
    """A reply that another attempt may mend; `after` is how many seconds the endpoint asks to wait."""

    def __init__(self, message: str, after: float = 0.0):
        super().__init__(message)
        self.after = after


class GaveUp(Exception):
    """A sample that gets no response, for the reason in the message; the others go on."""


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_):
        return None


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask. `options` go into the request's body: temperature, max_tokens and the like."""
    url: str
    model: str
    key: str = field(default="", repr=False)
    options: dict = field(default_factory=dict)
    timeout: float = 120.0  # seconds for a whole reply
    attempts: int = 6
    pause: float = 1.0  # seconds before the second attempt; doubled before each further one

    def scrub(self, text: str) -> str:
        """One line of at most 300 characters without the key, or what is left of one that was cut off on its way."""
        for length in range(len(self.key), 0, -1):
            if length >= 8 or length == len(self.key):
                text = text.replace(self.key[:length], "[key]")
        return " ".join(text.split())[:300]


def endpoint_from_environment(model: str, **settings) -> Endpoint:
    """Raises a one-line ValueError where the environment cannot be used; the key is not in it."""
    url = os.environ.get("OPENAI_BASE_URL", "").strip() or "https://api.openai.com/v1"
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not _is_address(url):
        raise ValueError(f"OPENAI_BASE_URL is {url!r}; http://HOST… or https://HOST… in plain ASCII expected")
    if not key and url.startswith("https://api.openai.com"):
        raise ValueError("OPENAI_API_KEY is not set; an endpoint of your own goes into OPENAI_BASE_URL")
    if not (key.isascii() and key.isprintable()):  # http.client would print the key in its refusal
        raise ValueError("OPENAI_API_KEY holds a character that cannot be sent")
    return Endpoint(f"{url.rstrip('/')}/chat/completions", model, key, **settings)


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").encode("idna")  # as the resolver will: ValueError for "a..b"
        return bool(re.fullmatch("https?://[!-~]+", url) and host and parts.port != 0)
    except ValueError:
        return False


def request_body(endpoint: Endpoint, images: list, text: str) -> bytes:
    """A chat request: the images, then the text, in one user turn."""
    content = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
    content.append({"type": "text", "text": text})
    return json.dumps({"model": endpoint.model, "messages": [{"role": "user", "content": content}],
                       **endpoint.options}).encode()


def _data_url(image) -> str:
    image, file = image.copy(), io.BytesIO()
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    image.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def ask(endpoint: Endpoint, body: bytes, stop: threading.Event) -> dict:
    """One request → {"response", "tokens_in", "tokens_out"}; tried again, after a pause, where that may help.

    Raises GaveUp where this sample gets no response, ValueError where no other one would either."""
    for attempt in range(endpoint.attempts):
        try:
            return _read_reply(endpoint, _post(endpoint, body))
        except TryAgain as problem:
            reason, after = str(problem), problem.after
        # Random, so that requests that were turned away together do not come back together.
        pause = endpoint.pause * 2 ** attempt * random.uniform(0.5, 1)
        if attempt + 1 == endpoint.attempts or stop.wait(min(max(pause, after), LONGEST_PAUSE)):
            break
    raise GaveUp(f"{reason}, {attempt + 1} times" if attempt else reason)


def _post(endpoint: Endpoint, body: bytes) -> bytes:
    key = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    request = urllib.request.Request(endpoint.url, body, {"Content-Type": "application/json", **key})
    deadline = time.monotonic() + endpoint.timeout
    try:
        with urllib.request.build_opener(NoRedirects).open(request, timeout=endpoint.timeout) as reply:
            return _read_until(reply, deadline)
    except urllib.error.HTTPError as problem:
        raise _verdict(endpoint, problem) from None
    except (OSError, http.client.HTTPException) as problem:  # no connection, a cut one, a timeout
        raise TryAgain(endpoint.scrub(f"{type(problem).__name__}: {problem}")) from None


def _read_until(reply, deadline: float) -> bytes:
    """The whole body; a socket's timeout alone would wait for ever for one that comes byte by byte."""
    parts, size = [], 0
    while part := reply.read1(65536):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline or size > LARGEST_REPLY:
            raise TryAgain("a reply without end")
    return b"".join(parts)  # one that was cut off is no JSON any more


def _verdict(endpoint: Endpoint, problem: urllib.error.HTTPError) -> Exception:
    """What an error status means: again, not this sample, or not at all."""
    try:
        said = problem.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        said = ""
    message = endpoint.scrub(f"{endpoint.url} answered {problem.code}: {said or problem.reason}")
    if problem.code in (408, 409, 425, 429) or problem.code >= 500:
        after = problem.headers.get("Retry-After") or ""
        return TryAgain(message, float(after) if re.fullmatch(r"\d{1,6}(\.\d*)?", after) else 0.0)
    if problem.code < 400 or problem.code in (401, 402, 403, 404, 405):
        return ValueError(message)
    return GaveUp(message)


def _read_reply(endpoint: Endpoint, reply: bytes) -> dict:
    try:
        completion = json.loads(reply, parse_int=float)  # int refuses 5,000 digits, and the whole reply with them
        response = completion["choices"][0]["message"].get("content") or ""  # None: the expert refused
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise TryAgain(endpoint.scrub(f"not a chat completion: {reply.decode(errors='replace')}")) from None
    if not isinstance(response, str):
        raise TryAgain("not a chat completion: its content is no text")
    # A lone surrogate can be written in JSON but in no file.
    response = response.encode("utf-8", "replace").decode()
    usage = completion.get("usage")
    return {"response": response, "tokens_in": _tokens(usage, "prompt_tokens"),
            "tokens_out": _tokens(usage, "completion_tokens")}


def _tokens(usage, name: str) -> int:
    """A count, which JSON gave as a float; 0 for what is none: the response is paid for, whatever stands beside it."""
    count = usage.get(name) if isinstance(usage, dict) else None
    return int(count) if isinstance(count, float) and 0 <= count < math.inf else 0


def ask_all(endpoint: Endpoint, samples: list, prompt_of: Callable, path: Path, *, template: str = "",
            concurrency: int = 8) -> dict[str, str]:
    """Ask for every sample that `path` has no answer for yet; returns response by sample id, old and new.

    `prompt_of(sample)` is (images, text), called only for what is asked. A sample without a response is
    left out; as many in a row as there are requests at a time, at least three, are a ValueError."""
    request = request_digest(endpoint.model, endpoint.options, template)
    answers, missing = answered_before(path, samples, request)
    stop, lock, new = threading.Event(), threading.Lock(), {}
    path.parent.mkdir(parents=True, exist_ok=True)

    def ask_one(sample):
        answer = ask(endpoint, request_body(endpoint, *prompt_of(sample)), stop)
        line = json.dumps({"id": sample.id, **answer, "request": request}) + "\n"
        with lock:  # here, in the thread: what is paid for is kept
            append_whole(path, line.encode())
        new[sample.id] = answer

    pool = ThreadPoolExecutor(concurrency)
    try:
        with progress(len(missing), "expert", "response") as bar:
            _wait_for([pool.submit(ask_one, sample) for sample in missing], bar, max(3, concurrency))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)  # those on their way still arrive, and are kept
        say(f"{endpoint.model}: {cost_line(new)} in this run, {cost_line({**answers, **new})} in all")
    return {name: answer["response"] for name, answer in {**answers, **new}.items()}


def append_whole(path: Path, line: bytes) -> None:
    """The whole line at the file's end, or an OSError and the file as it was: a full disk takes half a line, and then
    whole ones behind it."""
    with open(path, "a+b", buffering=0) as file:  # a buffer would be written once more when the file is closed
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            raise OSError(f"{path} ends in half a line; nothing is written behind it")
        try:
            while line:
                line = line[file.write(line):]
        except OSError as problem:
            file.truncate(size)
            problem.filename = str(path)
            raise


def _wait_for(futures: list, bar, most_in_a_row: int) -> None:
    in_a_row, total = 0, 0
    for future in as_completed(futures):
        try:
            future.result()
            in_a_row = 0
        except GaveUp as problem:
            in_a_row, total, reason = in_a_row + 1, total + 1, problem
        if in_a_row == most_in_a_row:
            raise ValueError(f"no response for {in_a_row} samples in a row: {reason}")
        bar.update()
    if total:
        say(f"no response for {total} of {len(futures)} samples (another run asks again); the last: {reason}")


def request_digest(model: str, options: dict, template: str) -> str:
    """What answers must have in common to stand in one file."""
    return hashlib.sha256(json.dumps([model, options, template]).encode()).hexdigest()[:12]


def answered_before(path: Path, requests: list, request: str) -> tuple[dict[str, dict], list]:
    """What earlier runs were answered, and the requests that are left to ask."""
    answers = read_answers(path, request)
    missing = [one for one in requests if one.id not in answers]
    if len(missing) < len(requests):
        say(f"{path}: {len(requests) - len(missing)} of {len(requests)} responses are there already")
    return answers, missing


def cost_line(answers: dict[str, dict]) -> str:
    """What was paid for."""
    tokens = [sum(answer[name] for answer in answers.values()) for name in ("tokens_in", "tokens_out")]
    return f"{len(answers):,} responses, {tokens[0]:,} tokens in, {tokens[1]:,} tokens out"


def read_answers(path: Path, request: str) -> dict[str, dict]:
    """What earlier runs were answered. A last line that was left half written is cut off the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[:content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    answers = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            answer = json_value(line)
            name = answer.pop("id")
            answers[name] = answer
            known = answer["request"] == request and answer["tokens_in"] + answer["tokens_out"] >= 0
            if not (isinstance(name, str) and isinstance(answer["response"], str)):
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{path}:{number}: found {line[:60]!r}; an expert's answer expected") from None
        if not known:
            raise ValueError(f"{path}:{number}: this was asked of another model, or with other options or "
                             "another template; move the file away to ask anew")
    return answers


def fill_template(template: str, sample, question: str, answer: str) -> str:
    """A user's own prompt: {question} is the task's, {answer} the gold one, {text} and so on the sample's."""
    values = {**{part.name: getattr(sample, part.name) for part in fields(sample)}, "question": question,
        "answer": answer}
    values = {name: ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
              for name, value in values.items()}
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def read_template(path: str) -> str:
    """"" without a path; ValueError where there is no template, or one that would not show the expert the text."""
    if not path:
        return ""
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"--template {path}: {problem}; a text file in UTF-8 expected") from None
    if "{text}" not in template and "{question}" not in template:
        raise ValueError(f"--template {path}: no {{text}} or {{question}} in it; the expert would not see the text")
    return template
