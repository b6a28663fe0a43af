"""One self-contained HTML page about one or several runs.

    python -m grpo.report runs/stage-2                     writes runs/stage-2/report.html
    python -m grpo.report runs/demo --output demo.html     all runs and evaluations in a folder
    python -m grpo.report runs/stage-2 --live              serves the page on 127.0.0.1, up to date as runs go on"""

from dataclasses import dataclass
from pathlib import Path

from grpo.report.serve import Reader, server
from grpo.runtime.files import write_whole
from grpo.runtime.settings import read_settings, run_program, setting


@dataclass
class Settings:
    """One self-contained HTML page about one or several runs."""

    runs: list[str] = setting([], "folders of runs or evaluations", positional=True, metavar="RUN", top=True)
    output: str = setting("", "file to write; empty: report.html in the first RUN", top=True)
    live: bool = setting(False, "serve the page on 127.0.0.1 and refresh it as the runs go on", top=True)
    port: int = setting(8770, "for --live; 0 takes any free port", top=True, least=0, most=65535)


def write(words: list[str], output: Path | None) -> Path:
    output = output or Path(words[0]) / "report.html"
    write_whole(output, Reader(words).page(live=False).encode(errors="replace"))
    return output


def serve(words: list[str], port: int) -> None:
    with server(words, port) as http:
        print(f"http://127.0.0.1:{http.server_port}/  (Ctrl-C ends it)", flush=True)
        try:
            http.serve_forever()
        except KeyboardInterrupt:
            print()


def main(words: list[str] | None = None) -> None:
    settings = read_settings(Settings, words)
    if settings.live:
        return serve(settings.runs, settings.port)
    path = write(settings.runs, Path(settings.output) if settings.output else None)
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB): open it in a browser")


if __name__ == "__main__":
    run_program(main)
