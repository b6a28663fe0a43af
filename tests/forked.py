"""A Python that starts in a twentieth of a second: its processes are forked from one that has imported the slow things.

Importing torch and transformers takes 7 s of a core, and a run under torchrun does it two or three times. `serve`
imports them once and then forks a process for everyone who asks; `ask` is what stands in for the interpreter: it
takes the words of `python` (-m MODULE, -c CODE or FILE, with -u), hands them to the server with its environment, its
folder and its standard streams, passes signals on, and ends as the forked process ends, killed by the same signal
where it was killed. For torchrun (PYTHON_EXEC), a shell or a test this is an interpreter; what it does not show is
the start of a real one. """

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PRELOADED = ("grpo.train", "sft.train", "sft.annotate", "grpo.evaluate", "grpo.predict", "grpo.compare",
             "data.toy.world", "data.toy.posts", "torch.distributed.run", "tiny")


def ask(place: str, words: list[str]) -> None:
    """Have the server at `place` run `python WORDS`; returns never."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        request = json.dumps([words, dict(os.environ), os.getcwd(), sys.argv[0]]).encode()
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
        pid = int.from_bytes(server.recv(8), "big")
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        answer = server.recv(8)
    status = int.from_bytes(answer, "big") if answer else signal.SIGKILL
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) in PASSED_ON:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def receive(connection: socket.socket) -> list:
    """The request; its streams have become this process's."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += connection.recv(1 << 16)
    return json.loads(request)


def attend(connection: socket.socket) -> list | None:
    """Fork the process that was asked for, in which this returns the request; here, see it to its end."""
    import contextlib
    import threading

    request = receive(connection)
    pid = os.fork()
    if not pid:
        connection.close()
        return request

    def outlive_nobody():
        with contextlib.suppress(ProcessLookupError):
            if not connection.recv(1):  # who asked is gone
                os.kill(pid, signal.SIGKILL)

    connection.sendall(pid.to_bytes(8, "big"))
    threading.Thread(target=outlive_nobody, daemon=True).start()
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(status.to_bytes(8, "big"))
    os._exit(0)


def serve(place: str) -> list:
    """Answer until standard input, which whoever started the server holds open, ends. Returns in forked processes
    alone."""
    import gc
    import importlib
    import select

    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # the pages of what is there stay shared
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place + ".new")
        listener.listen(64)
        os.rename(place + ".new", place)  # from here on it can be asked
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                return attend(connection)
            connection.close()
            bury()
    os._exit(0)


def bury() -> None:
    """Wait for the children that have ended."""
    import contextlib

    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def become(words: list[str], environment: dict, folder: str, python: str, path: list[str]) -> None:
    """Run what `python WORDS` would, as __main__ of this process."""
    import importlib
    import runpy

    import torch

    os.environ.clear()
    os.environ.update(environment, PYTHON_EXEC=python)
    os.chdir(folder)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    unbuffered = words[0] == "-u"
    words = words[unbuffered:]
    raw = open(1, "wb", buffering=0, closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1 if raw.isatty() else -1)
    if unbuffered:
        import io

        sys.stdout = io.TextIOWrapper(raw, encoding="utf-8", write_through=True)
    kind, *rest = words if words[0] in ("-m", "-c") else ("", *words)
    sys.argv = ["-c" if kind == "-c" else rest[0], *rest[1:]]
    sys.path[:] = [os.path.dirname(os.path.abspath(rest[0])) if not kind else folder,
                   *filter(None, environment.get("PYTHONPATH", "").split(":")), *path]
    importlib.invalidate_caches()
    if kind == "-m":
        sys.modules.pop(rest[0], None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(rest[0], run_name="__main__")


def finish(status: int) -> None:
    """What an interpreter does at its end, but for taking down what was imported, which takes a second."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    paths = sys.path[1:]  # an interpreter's own
    sys.path[1:1] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    request = serve(sys.argv[1])
    try:
        become(*request, paths)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status == 1 and end.code != 1:
            print(end.code, file=sys.stderr)
    except BaseException as error:
        trace = error.__traceback__
        while trace.tb_next and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        status = 1
    finish(status)
