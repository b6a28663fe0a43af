"""Asking an expert over HTTP: a real server on the loopback interface that misbehaves in every way it can."""
import base64
import io
import json
import re
import resource
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from data import more
from more_folder import line, write_more
from sft import annotate, experts as expert
from sft.filters import Request

KEY = "sk-very-secret"
PEER = "/per/per/peer"
STEPS = " ".join(f"Step {k}: because." for k in range(1, 7))


def completion(text, **usage):
    return {"choices": [{"message": {"content": text}}],
            "usage": usage or {"prompt_tokens": 100, "completion_tokens": 10}}


def gold(body):
    """An expert that reads the answer out of the prompt."""
    text = body["messages"][0]["content"][-1]["text"]
    label = PEER if f"answer is {PEER}" in text else "none"
    return 200, completion(f"<think> {STEPS} </think> <answer>{label.lstrip('/')}</answer>")


@contextmanager
def server(behave):
    """`behave(number, body)` is (status, body[, headers]) or a function of the handler."""
    requests, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append((self.path, dict(self.headers), body))
                number = len(requests)
            reply = behave(number, body)
            if callable(reply):
                return reply(self)
            status, content, *headers = reply
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        http.requests = requests
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield http
        finally:
            http.shutdown()


def endpoint(http, **settings):
    return expert.Endpoint(f"http://127.0.0.1:{http.server_port}/v1/chat/completions", "gpt-x", KEY,
                           **{"timeout": 5.0, "attempts": 3, "pause": 0.01, **settings})


def ask(http, **settings):
    return expert.ask(endpoint(http, **settings), b'{"messages": []}', threading.Event())


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def samples(tmp_path):
    write_more(tmp_path, [line()] * 8 + [line(relation=PEER)] * 4)
    return more.load(tmp_path, "train")


def ask_all(http, samples, path, **settings):
    requests = [Request(sample.id, lambda sample=sample: ([], sample.id)) for sample in samples]
    template = settings.pop("template", "")
    return expert.ask_all(endpoint(http, **settings), requests, path, template)


# ---- one request ----


def test_images_come_before_the_text_and_the_key_in_the_header(samples):
    with server(lambda number, body: gold(body)) as http:
        here = endpoint(http, options={"temperature": 0.5})
        images = [Image.new("RGB", (3000, 1500), "red"), Image.new("RGB", (20, 10), "blue")]
        body = expert.request_body(here, images, "What is it?")
        assert expert.ask(here, body, threading.Event())["tokens_in"] == 100
        path, headers, sent = http.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert (sent["model"], sent["temperature"]) == ("gpt-x", 0.5)
    *shown, text = sent["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is it?"}
    urls = [part["image_url"]["url"] for part in shown]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    sizes = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in urls]
    assert sizes == [(1536, 768), (20, 10)] and images[0].size == (3000, 1500)


def cut(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def slam(handler):
    handler.close_connection = True


def late(handler):
    time.sleep(1)
    slam(handler)


def byte_by_byte(handler):
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(1000):
            handler.wfile.write(b" ")
            time.sleep(0.05)
    except OSError:
        pass


MISBEHAVIOUR = {
    "429": (429, {"error": "slow down"}), "500": (500, b"oops"), "503": (503, b""), "cut off": cut,
    "hung up": slam, "bad status": lambda handler: handler.wfile.write(b"what?\r\n"),
    "too slow": late, "byte by byte": byte_by_byte, "no JSON": (200, b"<html>"), "other JSON": (200, []),
    "no choices": (200, {"choices": []}), "no text": (200, {"choices": [{"message": {"content": [1]}}]}),
    "nested": (200, b"[" * 100_000), "empty": (200, b""),
}


@pytest.mark.parametrize("reply", MISBEHAVIOUR.values(), ids=MISBEHAVIOUR)
def test_what_may_go_better_is_tried_again(reply):
    timeout = 0.5 if reply in (late, byte_by_byte) else 5
    with server(lambda number, body: reply if number < 3 else (200, completion("fine"))) as http:
        assert ask(http, timeout=timeout) == {"response": "fine", "tokens_in": 100, "tokens_out": 10}
        assert len(http.requests) == 3
    with server(lambda number, body: reply) as http:
        start = time.monotonic()
        with pytest.raises(expert.GaveUp, match=", 3 times"):
            ask(http, timeout=timeout)
        assert len(http.requests) == 3 and time.monotonic() - start < 20


@pytest.mark.parametrize("status", [401, 402, 403, 404, 302])
def test_what_no_sample_would_survive_ends_it_at_once_without_the_key(status):
    said = f"Incorrect API key:\n\n {KEY}".encode()
    with server(lambda number, body: (status, said, {"Location": "/elsewhere"})) as http:
        with pytest.raises(ValueError, match=f"chat/completions answered {status}: .*Incorrect") as caught:
            ask(http)
        assert len(http.requests) == 1
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)


LONG_KEY = "sk-proj-" + "".join(f"{n:03}" for n in range(60))


def shown(reply):
    with server(lambda number, body: reply) as http:
        with pytest.raises((expert.GaveUp, ValueError)) as caught:
            expert.ask(expert.Endpoint(f"http://127.0.0.1:{http.server_port}", "m", LONG_KEY, attempts=1), b"{}",
                       threading.Event())
    return str(caught.value)


@pytest.mark.parametrize("blanks", [0, 20, 80, 1930])
@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_no_part_of_a_key_is_shown_wherever_its_text_is_cut(status, blanks):
    said = f'{{"error":{{"message":"{" " * blanks}Incorrect API key provided: {LONG_KEY}"}}}}'
    for end in (len(said), -40):  # whole, and as a connection that ends in the middle of the key leaves it
        message = shown((status, said[:end].encode()))
        assert LONG_KEY[:8] not in message and "Incorrect API key" in message and len(message) <= 300


ODD_USAGE = {
    "infinite": '{"prompt_tokens": 1e400, "completion_tokens": Infinity}', "no number": '{"prompt_tokens": NaN}',
    "negative": '{"prompt_tokens": -5, "completion_tokens": -0.5}', "list": "[1]", "text": '"many"', "number": "7",
    "null": "null", "texts": '{"prompt_tokens": "many", "completion_tokens": [1]}', "true": '{"prompt_tokens": true}',
    "endless": f'{{"prompt_tokens": {"1" * 5000}}}',
}


@pytest.mark.parametrize("usage", ODD_USAGE.values(), ids=ODD_USAGE)
def test_a_response_with_an_odd_usage_costs_one_request_and_is_kept(samples, tmp_path, usage):
    reply = f'{{"choices": [{{"message": {{"content": "fine"}}}}], "usage": {usage}}}'.encode()
    with server(lambda number, body: (200, reply)) as http:
        for _ in range(2):
            assert ask_all(http, samples[:1], tmp_path / "answers.jsonl") == {"train/0": "fine"}
        assert len(http.requests) == 1
    stored = json.loads((tmp_path / "answers.jsonl").read_text())
    assert (stored["tokens_in"], stored["tokens_out"]) == (0, 0)


def test_the_good_count_of_a_half_odd_usage_is_kept():
    with server(lambda number, body: (200, completion("a", prompt_tokens=-1, completion_tokens=7.0))) as http:
        assert ask(http) == {"response": "a", "tokens_in": 0, "tokens_out": 7}


def test_a_sample_that_is_refused_is_not_tried_again():
    with server(lambda number, body: (400, {"error": "image too large"})) as http:
        with pytest.raises(expert.GaveUp, match="answered 400: .*image too large"):
            ask(http)
        assert len(http.requests) == 1


def test_pauses_grow_and_the_endpoint_s_own_wish_is_met(monkeypatch):
    pauses = []

    class Event(threading.Event):
        def wait(self, seconds):
            pauses.append(seconds)

    wishes = [{}, {}, {"Retry-After": "7"}, {"Retry-After": "86400"}, {"Retry-After": "tomorrow"}]
    replies = [(429, b"", wish) for wish in wishes] + [(200, completion("fine"))]
    with server(lambda number, body: replies[number - 1]) as http:
        expert.ask(endpoint(http, attempts=6, pause=1.0), b"{}", Event())
    assert 0.5 <= pauses[0] <= 1 <= pauses[1] <= 2
    assert pauses[2:4] == [7, expert.LONGEST_PAUSE] and 8 <= pauses[4] <= 16


def test_a_refusal_is_an_empty_response_and_surrogates_are_mended():
    with server(lambda number, body: (200, completion(None))) as http:
        assert ask(http)["response"] == ""
    with server(lambda number, body: (200, completion("a\ud800b"))) as http:
        assert ask(http)["response"] == "a?b"


def test_nobody_at_home_is_said_without_the_key():
    here = expert.Endpoint("http://127.0.0.1:1/v1", "m", KEY, attempts=2, pause=0.01)
    with pytest.raises(expert.GaveUp, match="refused") as caught:
        expert.ask(here, b"{}", threading.Event())
    assert KEY not in str(caught.value) and KEY not in repr(here)


# ---- many requests ----


def test_a_killed_run_goes_on_where_it_was(samples, tmp_path, capsys):
    path = tmp_path / "out" / "answers.jsonl"
    first, no_more = (200, completion("first")), (401, b"no more")
    with server(lambda number, body: first if number <= 5 else no_more) as http:
        with pytest.raises(ValueError, match="answered 401: no more"):
            ask_all(http, samples, path, concurrency=1)
    assert len(path.read_text().splitlines()) == 5
    with path.open("a") as file:
        file.write('{"id": "train/5", "respon')  # killed while it wrote
    with server(lambda number, body: (200, completion("second"))) as http:
        responses = ask_all(http, samples, path)
        assert len(http.requests) == 7
    assert responses == {f"train/{i}": "first" if i < 5 else "second" for i in range(12)}
    assert "5 of 12 responses are there already" in capsys.readouterr().out
    with server(lambda number, body: (500, b"")) as http:
        assert ask_all(http, samples, path) == responses and not http.requests


def test_the_cost_is_counted(samples, tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    with server(lambda number, body: (200, completion("a", prompt_tokens=1000, completion_tokens=7))) as http:
        ask_all(http, samples[:3], path)
        ask_all(http, samples[:4], path)
    printed = capsys.readouterr().out
    assert "gpt-x: 3 responses, 3,000 tokens in, 21 tokens out in this run" in printed
    assert "1 responses, 1,000 tokens in, 7 tokens out in this run, 4 responses, 4,000 tokens" in printed


def test_no_more_requests_at_a_time_than_allowed(samples, tmp_path):
    now, most, lock = [0], [0], threading.Lock()

    def behave(number, body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return 200, completion("a")

    with server(behave) as http:
        ask_all(http, samples, tmp_path / "answers.jsonl", concurrency=3)
    assert 1 < most[0] <= 3


def test_refused_samples_do_not_stop_the_others(samples, tmp_path, capsys):
    fine, refused = (200, completion("a")), (400, b"not this one")
    with server(lambda number, body: fine if number % 3 else refused) as http:
        responses = ask_all(http, samples, tmp_path / "answers.jsonl", concurrency=1)
    assert set(responses) == {sample.id for i, sample in enumerate(samples, 1) if i % 3}
    assert "no response for 4 of 12 samples" in capsys.readouterr().out


def test_an_endpoint_that_refuses_everything_is_left_soon(samples, tmp_path):
    with server(lambda number, body: (400, b"no such option")) as http:
        with pytest.raises(ValueError, match="no response for 3 samples in a row: .*no such option"):
            ask_all(http, samples, tmp_path / "answers.jsonl", concurrency=1)
        assert len(http.requests) <= 5


@pytest.mark.parametrize("change", [{"options": {"temperature": 1}}, {"template": "other {text}"}])
def test_answers_to_another_request_are_not_mixed_in(samples, tmp_path, change):
    with server(lambda number, body: (200, completion("a"))) as http:
        ask_all(http, samples[:1], tmp_path / "answers.jsonl")
        with pytest.raises(ValueError, match="answers.jsonl:1: this was asked of another model"):
            ask_all(http, samples, tmp_path / "answers.jsonl", **change)


def test_a_broken_line_among_the_answers_is_named(tmp_path):
    (tmp_path / "answers.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="answers.jsonl:1: found .*; expected an expert's answer"):
        expert.read_answers(tmp_path / "answers.jsonl", "")


@pytest.mark.parametrize("length", [6000, 10 ** 6])  # a buffer's worth, and more than that
def test_a_full_disk_leaves_whole_lines_alone(samples, tmp_path, length):
    path, (soft, hard) = tmp_path / "answers.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    lengths = {"train/0": 96_000, "train/1": length, "train/2": 5}

    def behave(number, body):
        name = body["messages"][0]["content"][0]["text"]
        time.sleep(0.3 if name == "train/2" else 0)  # on its way while the one before it fails
        return 200, completion("x" * lengths[name])

    with server(behave) as http:
        ask_all(http, samples[:1], path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 5, hard))  # as a full disk: a short write, then an error
        try:
            with pytest.raises(OSError, match="answers.jsonl"):
                ask_all(http, samples[:3], path, concurrency=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [json.loads(row)["id"] for row in path.read_text().splitlines()] == ["train/0", "train/2"]
        assert len(ask_all(http, samples[:3], path)) == 3 and len(http.requests) == 4


# ---- the whole program ----


def annotated(folder, *words):
    annotate.main(["--data", str(folder), "--expert", "openai:gpt-x", "--fraction", "1", "--output",
                   str(folder / "cold.jsonl"), "--attempts", "2", *words])
    return [json.loads(row) for row in (folder / "cold.jsonl").read_text().splitlines()]


@pytest.fixture
def surroundings(monkeypatch):
    def point_at(http):
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{http.server_port}/v1/")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return point_at


def test_an_asked_expert_ends_in_cold_start_data(samples, tmp_path, surroundings, capfd):
    with server(lambda number, body: gold(body)) as http:
        surroundings(http)
        lines = annotated(tmp_path)
        assert http.requests[0][2]["max_tokens"] == 2048
        assert len(http.requests[0][2]["messages"][0]["content"]) == 3
    assert [entry["id"] for entry in lines] == [sample.id for sample in samples]
    assert sum(f"<answer>{PEER}</answer>" in entry["response"] for entry in lines) == 4
    assert KEY not in "".join(capfd.readouterr())
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_an_endpoint_that_knows_no_such_key_ends_the_program_and_leaves_no_data(samples, tmp_path, surroundings, capfd):
    with server(lambda number, body: (401, {"error": f"no such key: {KEY}"})) as http:
        surroundings(http)
        with pytest.raises(ValueError, match="chat/completions answered 401: .*no such key: .key.") as caught:
            annotated(tmp_path, "--concurrency", "2")
        assert len(http.requests) <= 4
    assert "\n" not in str(caught.value) and KEY not in str(caught.value) + "".join(capfd.readouterr())
    assert not (tmp_path / "cold.jsonl").exists()
    drawn = json.loads((tmp_path / "cold.drawn.json").read_text())  # the draw needs no expert
    assert list(drawn) == [sample.id for sample in samples]


def test_a_template_takes_the_place_of_the_prompt(samples, tmp_path, surroundings):
    (tmp_path / "mine.txt").write_text('"{text}" and {entity}: {answer}, of {labels}. Keep {this}.')
    with server(lambda number, body: (200, completion("no"))) as http:
        surroundings(http)
        with pytest.raises(ValueError, match="no response of use"):
            annotated(tmp_path, "--template", str(tmp_path / "mine.txt"), "--concurrency", "1")
        text = http.requests[0][2]["messages"][0]["content"][-1]["text"]
    assert text == ('"Celtics beat Heat" and Heat: <answer>none</answer>, of none, /per/per/peer, '
                    "/per/org/member_of. Keep {this}.")


@pytest.mark.parametrize("words, environment, message", [
    ((), {"OPENAI_API_KEY": ""}, "OPENAI_API_KEY is not set"),
    ((), {"OPENAI_API_KEY": "sk-a\nb"}, "OPENAI_API_KEY holds a character that cannot be sent"),
    ((), {"OPENAI_BASE_URL": "file:///etc"}, "OPENAI_BASE_URL is 'file:///etc'; http"),
    *[((), {"OPENAI_BASE_URL": url}, f"OPENAI_BASE_URL is {re.escape(repr(url))}; http://HOST")
      for url in ("http://exämple.org/v1", "http://host/v1/ü", "http://[bad", "http://", "http:///v1", "http://a b",
                  "http://host:port", "http://host:99999", "http://a..b/v1")],
    (("--expert_options", "[1]"), {}, "expert_options \\[1\\]: a JSON object expected"),
    (("--concurrency", "0"), {}, "must be above 0"),
])
def test_what_cannot_be_asked_is_refused_at_once(samples, tmp_path, monkeypatch, words, environment, message):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for name, value in {"OPENAI_API_KEY": KEY, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as caught:
        annotated(tmp_path, *words)
    assert "sk-" not in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "cold.drawn.json").exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/v1", "http://[::1]:8000/v1", "https://my_server./v1/"])
def test_an_address_of_one_s_own_is_taken(monkeypatch, url):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    assert expert.endpoint_from_environment("m").url == f"{url.rstrip('/')}/chat/completions"
