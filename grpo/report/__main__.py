"""One self-contained HTML page about one or several runs.

    python -m grpo.report runs/stage-2                     writes runs/stage-2/report.html
    python -m grpo.report runs/demo --output demo.html     all runs and evaluations in a folder
    python -m grpo.report runs/stage-2 --live              serves the page on 127.0.0.1 and keeps it up to date
"""

import argparse
import sys
import time
from pathlib import Path

from grpo.report.images import Images
from grpo.report.page import render, report_data
from grpo.report.read import find_runs, read_run, short_names
from grpo.report.serve import server


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m grpo.report", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run or an evaluation, or a folder of such")
    parser.add_argument("--output", type=Path, help="file to write (default: report.html in the first RUN)")
    parser.add_argument("--live", action="store_true",
                        help="serve the page on 127.0.0.1 and refresh it as the runs go on")
    parser.add_argument("--port", type=int, default=8770,
                        help="for --live; 0 takes any free port (default: %(default)s)")
    return parser.parse_args(words)


def write(words: list[str], output: Path | None) -> Path:
    folders = find_runs(words)
    runs = [read_run(folder, name) for folder, name in zip(folders, short_names(folders))]
    output = output or Path(words[0]) / "report.html"
    page = render(report_data(runs, Images(), time.strftime("%Y-%m-%d %H:%M")))
    output.parent.mkdir(parents=True, exist_ok=True)
    new = output.with_name(output.name + ".new")
    new.write_text(page, encoding="utf-8", errors="replace")
    new.replace(output)
    return output


def serve(words: list[str], port: int) -> None:
    with server(words, port) as http:
        print(f"http://127.0.0.1:{http.server_port}/  (Ctrl-C ends it)", flush=True)
        try:
            http.serve_forever()
        except KeyboardInterrupt:
            print()


def main(words: list[str] | None = None) -> None:
    try:
        given = parse(words)
        if given.live:
            serve(given.runs, given.port)
        else:
            path = write(given.runs, given.output)
            print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB): open it in a browser")
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
