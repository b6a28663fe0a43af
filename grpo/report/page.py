"""Runs → one HTML page that needs nothing else: style, script and data are inside it, and it asks for nothing.

Model text can be anything. It stands in the page only as JSON with every "<" escaped, the script puts it on the screen
as text and never as markup, and a content policy lets no other script run than the page's own."""

import base64
import hashlib
import json
import time
from html import escape
from pathlib import Path

from grpo.report.images import Images
from grpo.report.read import Run

HERE = Path(__file__).parent
SCRIPTS = ("dom.js", "curves.js", "charts.js", "rollouts.js", "completions.js", "page.js")


def run_data(run: Run) -> dict:
    own = ("name", "kind", "columns", "rollouts", "recorded", "evaluation", "best", "warnings")
    ran = ("settings", "versions", "commit", "data_hash", "model_hash", "ranks", "started")
    return {"folder": str(run.folder), **{name: getattr(run, name) for name in own},
            **{name: run.what_ran.get(name) for name in ran}}


def image_data(runs: list[Run], images: Images) -> dict[str, dict]:
    """The embedded images of all recorded groups by path, the newest records first in line for room."""
    records = sorted((record for run in runs for record in run.rollouts), key=lambda record: -record["step"])
    groups = [group for record in records for group in record["groups"]]
    paths = [path for group in groups for path in group.get("images") or ()]
    return {path: images(path) for path in dict.fromkeys(paths)}


def as_json(data) -> str:
    """JSON that may stand inside a script element: no "<" can end it or open a comment."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def render(runs: list[Run], images: Images, live: bool) -> str:
    data = {"made": time.strftime("%Y-%m-%d %H:%M"), "live": live, "runs": [run_data(run) for run in runs],
            "images": image_data(runs, images)}
    script = "".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    asks = "'self'" if live else "'none'"
    policy = (f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
              f"connect-src {asks}; base-uri 'none'; form-action 'none'")
    parts = {"TITLE": escape(", ".join(run.name for run in runs)), "POLICY": policy,
             "STYLE": (HERE / "page.css").read_text(encoding="utf-8"), "SCRIPT": script, "DATA": as_json(data)}
    page = (HERE / "page.html").read_text(encoding="utf-8")
    head, *rest = page.split("{{")  # in one go, so that nothing inside a part is taken for a place
    return head + "".join(parts[name] + text for name, text in (piece.split("}}", 1) for piece in rest))
