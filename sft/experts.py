"""The experts that are asked: an OpenAI-compatible endpoint, or a checkpoint that runs here and costs nothing.

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
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.read import read_json_lines
from grpo.runtime.files import append_line
from grpo.runtime.log import progress, say

LONGEST_SIDE = 1536  # pixels sent; the big endpoints scale down to less
LARGEST_REPLY = 16 * 2 ** 20  # bytes
LONGEST_PAUSE = 60.0  # seconds
ANSWER = {"id": str, "response": str, "request": str, "tokens_in": int, "tokens_out": int}  # a line of the file
LOCAL_OPTIONS = {"max_tokens": 2048, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0}  # and their defaults
MAX_PIXELS = 1280 * 28 * 28  # of an image that a local expert is shown
AT_ONCE = 32  # a local expert's requests that are in memory together; after each of these their answers are on disk


class TryAgain(Exception):
    """(why, and perhaps the seconds that the endpoint asks to wait): a reply that another attempt may mend."""


class GaveUp(Exception):
    """A request that gets no response, for the reason in the message; the others go on."""


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Every status is a reply. A redirect is not followed: it would carry the key to another host."""

    http_response = https_response = lambda self, request, response: response


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask. `options` go into the request's body: temperature, max_tokens and the like."""
    url: str
    model: str
    key: str = field(default="", repr=False)
    options: dict = field(default_factory=dict)
    concurrency: int = 8  # requests at a time
    timeout: float = 120.0  # seconds for a whole reply
    attempts: int = 6
    pause: float = 1.0  # seconds before the second attempt; doubled before each further one

    def scrub(self, text: str) -> str:
        """One line of at most 300 characters without the key, or what is left of one that was cut off on its way."""
        for length in range(len(self.key), 0, -1):
            if length >= 8 or length == len(self.key):
                text = text.replace(self.key[:length], "[key]")
        return " ".join(text.split())[:300]

    def answer(self, requests: list, keep: Callable, bar) -> None:
        """Gives `keep` each request with its answer, those without one left out; as many of these in a row as there
        are requests at a time, at least three, are a ValueError."""
        pool, stop, in_a_row, total = ThreadPoolExecutor(self.concurrency), threading.Event(), 0, 0
        # kept in the thread: what is paid for is not lost
        ask_one = lambda request: keep(request, ask(self, request_body(self, *request.prompt()), stop))
        try:
            for future in as_completed([pool.submit(ask_one, request) for request in requests]):
                try:
                    future.result()
                    in_a_row = 0
                except GaveUp as problem:
                    in_a_row, total, reason = in_a_row + 1, total + 1, problem
                if in_a_row == max(3, self.concurrency):
                    raise ValueError(f"no response for {in_a_row} samples in a row: {reason}")
                bar.update()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)  # those on their way still arrive, and are kept
        if total:
            say(f"no response for {total} of {len(requests)} samples (another run asks again); the last: {reason}")


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
    turn = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    return json.dumps({"model": endpoint.model, "messages": [turn], **endpoint.options}).encode()


def _data_url(image) -> str:
    image, file = image.copy(), io.BytesIO()
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    image.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def ask(endpoint: Endpoint, body: bytes, stop: threading.Event) -> dict:
    """One request → {"response", "tokens_in", "tokens_out"}; tried again, after a pause, where that may help.

    Raises GaveUp where this one gets no response, ValueError where no other would either."""
    for attempt in range(endpoint.attempts):
        try:
            return _read_reply(endpoint, _post(endpoint, body))
        except TryAgain as problem:
            reason, *wish = problem.args
        pause = endpoint.pause * 2 ** attempt * random.uniform(0.5, 1)
        if attempt + 1 == endpoint.attempts or stop.wait(min(max([pause, *wish]), LONGEST_PAUSE)):
            break
    raise GaveUp(f"{reason}, {attempt + 1} times" if attempt else reason)


def _post(endpoint: Endpoint, body: bytes) -> bytes:
    """The reply. An error status is TryAgain, GaveUp (not this request) or ValueError (none at all)."""
    key = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    request = urllib.request.Request(endpoint.url, body, {"Content-Type": "application/json", **key})
    deadline, content = time.monotonic() + endpoint.timeout, b""
    try:
        with urllib.request.build_opener(AnyStatus).open(request, timeout=endpoint.timeout) as reply:
            while part := reply.read1(65536):  # the socket's timeout alone would wait for ever for single bytes
                content += part
                if time.monotonic() > deadline or len(content) > LARGEST_REPLY:
                    raise TryAgain("a reply without end")
    except (OSError, http.client.HTTPException) as problem:  # no connection, a cut one, a timeout
        raise TryAgain(endpoint.scrub(f"{type(problem).__name__}: {problem}")) from None
    if 200 <= reply.status < 300:
        return content  # one that was cut off is no JSON any more
    said = content[:2000].decode(errors="replace") or reply.reason
    message = endpoint.scrub(f"{endpoint.url} answered {reply.status}: {said}")
    if reply.status in (408, 409, 425, 429) or reply.status >= 500:
        after = reply.headers.get("Retry-After") or ""
        raise TryAgain(message, float(after) if re.fullmatch(r"\d{1,6}(\.\d*)?", after) else 0.0)
    raise (ValueError if reply.status < 400 or reply.status in (401, 402, 403, 404, 405) else GaveUp)(message)


def _read_reply(endpoint: Endpoint, reply: bytes) -> dict:
    try:
        completion = json.loads(reply, parse_int=float)  # int refuses 5,000 digits, and the whole reply with them
        response = completion["choices"][0]["message"].get("content") or ""  # None: the expert refused
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise TryAgain(endpoint.scrub(f"not a chat completion: {reply.decode(errors='replace')}")) from None
    if not isinstance(response, str):
        raise TryAgain("not a chat completion: its content is no text")
    usage = completion.get("usage")
    counts = [usage.get(f"{part}_tokens") if isinstance(usage, dict) else None for part in ("prompt", "completion")]
    tokens = [int(count) if isinstance(count, float) and 0 <= count < math.inf else 0 for count in counts]
    # A lone surrogate can be written in JSON but in no file.
    return {"response": response.encode("utf-8", "replace").decode(), "tokens_in": tokens[0], "tokens_out": tokens[1]}


class LocalExpert(NamedTuple):
    """A checkpoint's folder or its name on the hub, and every one of LOCAL_OPTIONS."""
    model: str
    options: dict

    def answer(self, requests: list, keep: Callable, bar) -> None:
        """Gives `keep` each request with its answer, AT_ONCE at a time."""
        from grpo.engine.rollout import Sampling, sample  # torch and the engine, for this expert alone
        from grpo.runtime.run import load_answering

        (encoder, policy), options = load_answering(self.model, "", "auto", MAX_PIXELS), self.options
        sampling = Sampling(int(options["max_tokens"]), encoder.end_tokens, options["temperature"], options["top_p"],
                            int(options["top_k"]), rows=AT_ONCE, seed=f"{options['seed']}/expert")
        for begin in range(0, len(requests), AT_ONCE):
            some = requests[begin : begin + AT_ONCE]
            prompts = [encoder.encode(*one.prompt(), id=one.id) for one in some]
            groups = sample(policy, prompts, 1, sampling, lambda written, ended, spared: bar.update(ended))
            for one, group in zip(some, groups):
                keep(one, {"response": encoder.decode(group.completions[0]), "tokens_in": len(group.prompt),
                           "tokens_out": len(group.completions[0])})


def local_expert(model: str, options: dict) -> LocalExpert:
    for name, value in options.items():
        if name not in LOCAL_OPTIONS or type(value) not in (int, float):
            raise ValueError(f"--expert_options: {name!r} is {value!r}; a number for one of "
                             f"{', '.join(LOCAL_OPTIONS)} expected")
    return LocalExpert(model, {**LOCAL_OPTIONS, **options})


def ask_all(expert: Endpoint | LocalExpert, requests: list, path: Path, template: str = "") -> dict[str, str]:
    """Response by request id, where there is one: those in `path`, and new ones, which are appended to it. A line's
    `request` is the digest of expert, options and template: answers of another are a ValueError."""
    digest = hashlib.sha256(json.dumps([expert.model, expert.options, template]).encode()).hexdigest()[:12]
    answers, new, lock = read_answers(path, digest), {}, threading.Lock()
    missing = [one for one in requests if one.id not in answers]
    if len(missing) < len(requests):
        say(f"{path}: {len(requests) - len(missing)} of {len(requests)} responses are there already")

    def keep(request, answer: dict) -> None:
        with lock:
            append_line(path, {"id": request.id, **answer, "request": digest})
        new[request.id] = answer

    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with progress(len(missing), "expert", "response") as bar:
                expert.answer(missing, keep, bar)
        finally:
            answers |= new
            say(f"{expert.model}: {cost(new)} in this run, {cost(answers)} in all")
    return {name: answer["response"] for name, answer in answers.items()}


def cost(answers: dict[str, dict]) -> str:
    into, out = (sum(answer[name] for answer in answers.values()) for name in ("tokens_in", "tokens_out"))
    return f"{len(answers):,} responses, {into:,} tokens in, {out:,} tokens out"


def read_answers(path: Path, request: str) -> dict[str, dict]:
    """What earlier runs were answered. A last line that was left half written is cut off the file."""
    if not path.exists():
        return {}
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    answers = {}
    for where, answer in read_json_lines(path, "an expert's answer", **ANSWER):
        if answer["request"] != request:
            raise ValueError(f"{where}: this was asked of another model, or with other options or another template; "
                             "move the file away to ask anew")
        answers[answer["id"]] = answer
    return answers
