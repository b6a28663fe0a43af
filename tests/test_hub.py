"""Hub names: from a cache without a network, from a hub, and one clear line for what a hub can answer."""

import http.server
import json
import threading

import huggingface_hub.constants
import pytest
import torch
from tiny_backbones import write_text_model

from grpo.engine import files
from grpo.engine.encode import Encoder
from grpo.engine.files import model_file
from grpo.engine.weights import load_policy

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = ["one two three four five"] * 3


class FakeHub(http.server.BaseHTTPRequestHandler):
    """owner/model is the folder that the server has; owner/gated wants a permission; of anything else there is
    nothing."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.server.folder / self.path.rpartition("/")[2]
        headers, status, content = {}, 404, b""
        if self.path in ("/", ""):
            status = 200
        elif self.path.startswith("/api/models/owner/model"):
            known = {"id": "owner/model", "sha": COMMIT,
                     "siblings": [{"rfilename": file.name} for file in self.server.folder.iterdir()]}
            status, content = 200, json.dumps([] if "/tree/" in self.path else known).encode()
        elif self.path.startswith("/owner/gated/"):
            status, headers = 403, {"X-Error-Code": "GatedRepo",
                                    "X-Error-Message": "Access to model owner/gated is restricted."}
        elif not self.path.startswith("/owner/model/"):
            headers = {"X-Error-Code": "RepoNotFound"}
        elif "/resolve/" in self.path and path.is_file():
            status, content = 200, path.read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{path.name}-{len(content)}"'}
        else:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub at localhost with owner/model, and an empty cache."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.folder, server.asked = write_text_model(tmp_path / "model", TEXTS), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    yield server
    server.shutdown()


def use(monkeypatch, address, cache):
    """As HF_ENDPOINT and HF_HUB_CACHE in the environment of a program that begins."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(files, "HUB", address)
    files.hub_answers.cache_clear()
    constants = huggingface_hub.constants
    template = "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in dict(ENDPOINT=address, HUGGINGFACE_CO_URL_TEMPLATE=address + template, HF_HUB_OFFLINE=False,
                            HF_HUB_CACHE=str(cache)).items():
        monkeypatch.setattr(constants, name, value)


def check_whole(folder):
    policy, encoder = load_policy("owner/model"), Encoder("owner/model")
    expected, prompt = load_policy(str(folder)).state_dict(), encoder.encode([], "one two")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in policy.state_dict().items())
    assert torch.equal(prompt.tokens,
                       Encoder(str(folder)).encode([], "one two").tokens) and policy.vocabulary == encoder.vocabulary


def test_a_model_comes_from_the_hub_and_the_next_time_from_the_cache_without_a_network(hub, monkeypatch, tmp_path):
    check_whole(hub.folder)
    assert any(request.startswith("GET ") and request.endswith("/model.safetensors") for request in hub.asked)
    nowhere = "http://127.0.0.1:9"  # the port of nothing
    use(monkeypatch, nowhere, tmp_path / "cache")
    check_whole(hub.folder)
    assert not files.hub_answers()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # said by the user: nobody is asked
    files.hub_answers.cache_clear()
    monkeypatch.setattr(files.urllib.request, "urlopen", None)
    check_whole(hub.folder)


@pytest.mark.parametrize("model, name, message", [
    ("owner/gated", "config.json", r"gated repo. Make sure to have access to it at https://huggingface.co/owner/gated"),
    ("owner/other", "config.json", "is not a local folder and is not a valid model identifier"),
    ("owner/model", "preprocessor_config.json", "does not appear to have a file named preprocessor_config.json"),
    ("not a name", "config.json", "config.json: no folder here, and "),
])
def test_what_a_hub_does_not_give_is_one_line(hub, model, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        model_file(model, name)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{model}: {name}: no folder here, and ")


def test_a_hub_without_a_config_says_so(hub):
    (hub.folder / "config.json").unlink()
    with pytest.raises(ValueError,
                       match="owner/model: config.json: no folder here, and the hub's model has no file config.json"):
        Encoder("owner/model")


def test_without_a_network_an_unknown_model_is_one_line_after_one_attempt(hub, monkeypatch, tmp_path):
    nowhere = "http://127.0.0.1:9"
    use(monkeypatch, nowhere, tmp_path / "other")
    attempts, urlopen = [], files.urllib.request.urlopen
    monkeypatch.setattr(files.urllib.request, "urlopen",
                        lambda *one, **more: attempts.append(one) or urlopen(*one, **more))
    for name in ("config.json", "tokenizer_config.json"):
        with pytest.raises(ValueError, match=f"owner/model: {name}: no folder here, and not among the models that were "
                                             f"downloaded before, while {nowhere} cannot be reached"):
            model_file("owner/model", name)
    assert len(attempts) == 1
