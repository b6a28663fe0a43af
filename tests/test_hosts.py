"""Two hosts, one of which is cut off in the middle: two network namespaces with a cable between them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_checkpoints import same_run
from test_faults import stop_after, words_of

from programs import ROOT, lines

pytestmark = pytest.mark.heavy
ADDRESS = {"a": "10.77.0.1", "b": "10.77.0.2"}


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


def name(host):
    """Of its network namespace, which is the machine's: other tests may run beside this one."""
    return f"grpo-{host}-{os.getpid()}"


def lay_cable():
    """Whether it could be done: it takes root and Linux."""
    if not shutil.which("ip") or any(ip("netns", "add", name(host)).returncode for host in ADDRESS):
        return False
    ip("link", "add", "cable-a", "netns", name("a"), "type", "veth", "peer", "name", "cable-b", "netns", name("b"))
    for host, address in ADDRESS.items():
        ip("-n", name(host), "addr", "add", f"{address}/24", "dev", f"cable-{host}")
        ip("-n", name(host), "link", "set", "lo", "up")
        ip("-n", name(host), "link", "set", f"cable-{host}", "up")
    return True


def lose_power(host):
    """The cable first, so that nobody hears of it."""
    ip("-n", name(host), "link", "set", f"cable-{host}", "down")
    for pid in ip("netns", "pids", name(host)).stdout.split():
        os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def hosts():
    laid = lay_cable()
    if laid:
        yield
        for host in ADDRESS:
            lose_power(host)
    for host in ADDRESS:
        ip("netns", "delete", name(host))
    if not laid:
        pytest.skip("no network namespaces here (they take root)")


def begin(host, words, restarts, log):
    """torchrun on one host, as docs/long-runs.md starts it on each; what it says goes into the file."""
    command = ["ip", "netns", "exec", name(host), sys.executable, "-m", "torch.distributed.run", "--nnodes", 2,
               "--nproc-per-node", 1, "--max-restarts", restarts, "--rdzv-backend", "c10d", "--rdzv-id", "run",
               "--rdzv-endpoint", f"{ADDRESS['a']}:29511", "--rdzv-conf",
               f"is_host={host == 'a'},join_timeout=90,keep_alive_interval=1", "--local-addr", ADDRESS[host],
               "--monitor-interval", 0.1, ROOT / "tests" / "faulty.py", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
                   "GLOO_SOCKET_IFNAME": f"cable-{host}", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(list(map(str, command)), env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)


def hear(log, words, seconds=90):
    """Wait until the file says it."""
    for _ in range(10 * seconds):
        if words in log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"not said: {words}\n{log.read_text()}")


MISSING = r"error: no rank has made progress for 0.1 minutes: .*rank 1 \(pid"


def test_one_host_is_cut_off_the_other_waits_and_both_go_on(hosts, folder, tmp_path):
    run, logs = tmp_path / "run", {name: tmp_path / f"{name}.log" for name in ("stays", "goes", "comes", "one", "two")}
    words = words_of(folder, run, "--hang_minutes", 0.1)
    stays, goes = begin("a", words, 2, logs["stays"]), begin("b", words, 2, logs["goes"])
    stop_after(SignalOnly(lambda: lose_power("b")), run, 2)
    goes.wait()
    hear(logs["stays"], "no rank has made progress")
    time.sleep(10)
    assert stays.poll() is None  # it waits
    ip("-n", name("b"), "link", "set", "cable-b", "up")
    comes = begin("b", words, 2, logs["comes"])
    ends, said = [stays.wait(timeout=240),
                  comes.wait(timeout=60)], logs["stays"].read_text() + logs["comes"].read_text()
    assert ends == [0, 0], said
    assert re.search(MISSING, said) and re.search(r"going on after step [1-5]",
                                                  said), said  # 1: cut off before 2 was whole
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(6))
    words = words_of(folder, tmp_path / "undisturbed")
    undisturbed = begin("a", words, 0, logs["one"]), begin("b", words, 0, logs["two"])
    assert [process.wait(timeout=240) for process in undisturbed] == [0, 0]
    same_run(tmp_path / "undisturbed", run)


def test_without_restarts_the_host_that_is_left_ends_and_says_who_is_missing(hosts, folder, tmp_path):
    words, log = words_of(folder, tmp_path, "--hang_minutes", 0.1), tmp_path / "stays.log"
    stays, goes = begin("a", words, 0, log), begin("b", words, 0, tmp_path / "goes.log")
    stop_after(SignalOnly(lambda: lose_power("b")), tmp_path, 2)
    goes.wait()
    assert stays.wait(timeout=120) != 0 and re.search(MISSING, log.read_text()), log.read_text()


class SignalOnly:
    """Stands where `stop_after` has a process: what happens instead of the signal."""

    def __init__(self, action):
        self.send_signal = lambda _: action()
