"""The runs' page; with `--live` on this machine's loopback address, asking every few seconds for what is new."""

import json
import time
from dataclasses import replace
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from urllib.parse import parse_qs, urlsplit

from grpo.report.images import Images
from grpo.report.page import as_json, image_data, render, run_data
from grpo.report.read import Run, find_runs, read_run, short_names

WAITING = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="3">
<title>Training report</title>
<p>Waiting for {}: nothing has been written there yet.</p></html>"""


class Reader:
    """Reads the runs anew for each request, images once and rollouts when there are more."""

    def __init__(self, words: list[str]):
        self.words, self.images, self.lock, self.before = words, Images(), Lock(), {}

    def runs(self, wait: bool = True) -> list[Run]:
        folders = find_runs(self.words, wait)
        for folder, name in zip(folders, short_names(folders)):
            self.before[folder] = read_run(folder, name, self.before.get(folder))
        return [self.before[folder] for folder in folders]

    def page(self, live: bool = True) -> str:
        with self.lock:
            if not (runs := self.runs(wait=live)):
                return WAITING.format(escape(", ".join(self.words)))
            return render(runs, self.images, live)

    def news(self, known: list[dict]) -> dict:
        """What the page does not have yet. `known` says of each run: name, number of metric lines, last recorded step.

        {"restart": true} where the page's runs are no longer these: another set, or one that began anew."""
        with self.lock:
            runs = self.runs()
            same = [run.name for run in runs] == [entry["name"] for entry in known]
            if not same or any(len(run.columns.get("step", ())) < entry["lines"] for run, entry in zip(runs, known)):
                return {"restart": True}
            runs = [replace(run, columns={name: values[entry["lines"] :] for name, values in run.columns.items()},
                            rollouts=[record for record in run.rollouts if record["step"] > entry["recorded"]])
                    for run, entry in zip(runs, known)]
            return {"made": time.strftime("%Y-%m-%d %H:%M:%S"), "runs": [run_data(run) for run in runs],
                    "images": image_data(runs, self.images)}


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, GET /news?known=… what is new as JSON."""

    def do_GET(self) -> None:
        # A page from elsewhere whose name points to this machine must not read the runs.
        host, _, port = self.headers.get("Host", "").rpartition(":")
        if host not in ("127.0.0.1", "localhost") or port != str(self.server.server_port):
            return self.answer(403, "text/plain", "this server answers to 127.0.0.1 only")
        url = urlsplit(self.path)
        try:
            if url.path == "/":
                self.answer(200, "text/html", self.server.reader.page())
            elif url.path == "/news":
                self.answer(200, "application/json", as_json(self.server.reader.news(read_known(url.query))))
            else:
                self.answer(404, "text/plain", "nothing here")
        except (ValueError, KeyError, TypeError, OSError) as problem:
            self.answer(400, "text/plain", str(problem))

    def answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode(errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """A line a poll would be noise."""


def read_known(query: str) -> list[dict]:
    return [{"name": str(entry["name"]), "lines": int(entry["lines"]), "recorded": float(entry["recorded"])}
            for entry in json.loads(parse_qs(query)["known"][0])]


def server(words: list[str], port: int) -> ThreadingHTTPServer:
    """Bound to loopback; port 0 takes a free one. OSError if the port is taken."""
    http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    http.reader = Reader(words)
    return http
