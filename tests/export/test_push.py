"""A run on the hub: its card, and what a small server that takes and gives as the hub does has of it afterwards."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dylora_moe
from dylora_moe import load
from dylora_moe.errors import BaseModelError, ExportError
from dylora_moe.export.card import base_name, model_card
from dylora_moe.export.push import check_repository, write_repository
from dylora_moe.report.records import read_run

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_thisMustNeverBeSeenAnywhere"
HOSTILE = "evil | name\n# Head <script>alert(1)</script> {{ 7*7 }} [x](javascript:y) `code`"


class Hub(BaseHTTPRequestHandler):
    """Takes one repository, keeps its files, and gives them back; without the token it refuses."""

    files: dict[str, bytes]
    created: list[dict[str, Any]]
    private: bool

    def do_GET(self) -> None:
        if "/revision/" in self.path or self.path.startswith("/api/models/"):
            if "/tree/" in self.path:
                found = [
                    {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                    for name, body in self.files.items()
                ]
                return self.answer(200, found)
            names = [{"rfilename": name} for name in self.files]
            return self.answer(200, {"id": "me/mine", "sha": COMMIT, "private": self.private, "siblings": names})
        if "/resolve/" in self.path:
            body = self.files.get(self.path.split("/resolve/")[1].partition("/")[2].partition("?")[0])
            if body is not None:
                etag = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
                return self.answer(200, body, etag)
        return self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "no"})
        if self.path.endswith("/repos/create"):
            self.created.append(json.loads(body))
            return self.answer(200, {"url": f"http://{self.headers['Host']}/me/mine", "name": "me/mine"})
        if "/preupload/" in self.path:
            wanted = json.loads(body)["files"]
            told = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in wanted]
            return self.answer(200, {"files": told})
        if "/commit/" in self.path:
            for line in body.splitlines():
                value = json.loads(line)
                if value["key"] == "file":
                    self.files[value["value"]["path"]] = base64.b64decode(value["value"]["content"])
            return self.answer(
                200,
                {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"http://{self.headers['Host']}/me/mine/commit/{COMMIT}",
                },
            )
        return self.answer(200, {})  # the card's header is checked

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    handler = type("TinyHub", (Hub,), {"files": {}, "created": [], "private": True})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    handler.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def run_python(
    code: str, *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's client reads its settings at import."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    clean |= {"PYTHONPATH": str(Path(dylora_moe.__file__).parents[1]), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=clean, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert TOKEN not in done.stdout + done.stderr
    return done


PUSH = "from dylora_moe.cli.main import main; main()"
LOAD = """
import json, torch
from dylora_moe import load
model, _ = load("me/mine", dtype=torch.float32)
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.arange(2, 20)[None]).logits.tolist()))
"""


@pytest.mark.slow
def test_what_was_sent_is_loaded_again(hub: Any, mixture_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf")}
    refused = run_python(PUSH, "push", mixture_folder, "me/mine", **settings)
    assert refused.returncode == 1 and "HF_TOKEN" in refused.stderr and not hub.files
    done = run_python(PUSH, "push", mixture_folder, "me/mine", "--json", **settings, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr[-2000:]
    assert hub.created[-1].get("visibility") == "private" or hub.created[-1].get("private") is True
    assert {file["name"] for file in json.loads(done.stdout)["files"]} <= set(hub.files)
    assert "README.md" in hub.files and "router.safetensors" in hub.files

    hub.files |= {"evil.bin": b"a pickle", "modeling.py": b"print()"}
    # Its base is a folder, of which the hub knows the name alone.
    again = run_python(LOAD, cwd=tiny_base.parent, **settings, HF_TOKEN=TOKEN)
    assert again.returncode == 0, again.stderr[-2000:]
    model, _ = load(mixture_folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=torch.arange(2, 20)[None]).logits
    torch.testing.assert_close(torch.tensor(json.loads(again.stdout.splitlines()[-1])), expected, rtol=0, atol=0)
    fetched = {path.name for path in (tmp_path / "hf").rglob("*")}
    assert "router.safetensors" in fetched and not fetched & {"evil.bin", "modeling.py"}


@pytest.mark.parametrize("base_is_here", [True, False])
def test_no_path_of_this_machine_is_sent(mixture_folder: Path, tmp_path: Path, base_is_here: bool) -> None:
    """Of a base that is a folder its name is sent; whoever has that folder where they work can load the model."""
    folder = Path(shutil.copytree(mixture_folder, tmp_path / "model"))
    path = folder / "dylora_moe.json"
    description = json.loads(path.read_text())
    base = Path(description["base"])
    if not base_is_here:
        path.write_text(json.dumps(description | {"base": f"/home/me/secret/{base.name}"}))
    (folder / "notes.txt").write_text("/home/me/secret")
    sent = write_repository(folder, "me/mine", tmp_path / "out")
    for file in sent:
        content = (tmp_path / "out" / file.name).read_bytes()
        assert str(base.parent).encode() not in content and b"secret" not in content, file.name
    assert json.loads((tmp_path / "out" / "dylora_moe.json").read_text())["base"] == base.name
    adapter = json.loads((tmp_path / "out" / "experts" / "wide" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == base.name
    assert "base_model" not in yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / base.name).symlink_to(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "work")
        load(tmp_path / "out")
        patch.chdir(tmp_path)
        with pytest.raises(BaseModelError, match=f"The base {base.name} must be a folder here"):
            load(tmp_path / "out")


@pytest.mark.parametrize(
    ("base", "revision", "name"),
    [
        ("org/model", "0123abc", "org/model"),
        ("pypi:smollm2", "sha256:1", "pypi:smollm2"),
        ("models/mine", "sha256-of-parts:1", "mine"),
        ("C:\\Users\\me\\mine", None, "mine"),
        ("/home/me/mine/", None, "mine"),
        ("~/mine", None, "mine"),
        ("/", None, "base"),
    ],
)
def test_only_folders_lose_their_path(base: str, revision: str | None, name: str) -> None:
    assert base_name(base, revision) == name


def test_nothing_private_goes_to_a_public_repository(hub: Any, mixture_folder: Path, tmp_path: Path) -> None:
    hub.private = False
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    refused = run_python(PUSH, "push", mixture_folder, "me/mine", **settings)
    assert refused.returncode == 1 and "is there and public" in refused.stderr and not hub.files


def test_the_card_says_what_the_run_was(finished_run: Path) -> None:
    run = read_run(finished_run)
    card = model_card(finished_run / "final", "me/mine", run)
    header, text = yaml.safe_load(card.split("---")[1]), card
    assert header["library_name"] == "dylora-moe" and "base_model" not in header
    for each in run.result["after"]["domains"]:
        assert f"| {each['domain']} | " in text and f" | {each['loss']:.3f} | {each['rows']} |" in text
    for each in run.data["domains"]:
        assert each["sha256"][:16] in text and f"| {each['num_train']} | not stated |" in text
    assert 'load("me/mine")' in text and "| lora\\_r | 8 |" in text and "folder of the machine" in text
    assert "linear router" in text and "expert\\_2" in text
    assert str(finished_run.parent) not in text and "/tmp" not in text


def test_no_name_becomes_markup(finished_run: Path) -> None:
    run = read_run(finished_run)
    data = json.loads(json.dumps(run.data))
    data["domains"][0] |= {"domain": HOSTILE, "licences": [HOSTILE], "sources": [f"/home/me/{HOSTILE}"]}
    data["domains"][1] |= {"sources": ["hub:openai/gsm8k@newest", "/home/me/rows.jsonl"]}
    card = model_card(finished_run / "final", "me/mine", replace(run, data=data))
    assert (
        "<script" not in card.replace("\\<", "") and "{{ 7" not in card and "49" not in card.split("## Data")[1][:400]
    )
    assert "| hub\\:openai/gsm8k\\@newest, rows.jsonl |" in card and "/home" not in card
    rows = [line for line in card.splitlines() if line.startswith("| evil")]
    assert len(rows) == 1 and len([at for at in rows[0].replace("\\|", "").split(" | ")]) == 5
    assert not [line for line in card.splitlines() if line.startswith("# Head")]


@pytest.mark.parametrize("name", ["mine", "me/mine/more", "../mine", "me/..", "me/a b", 'me/"); import os', "me/"])
def test_only_hub_ids_are_repositories(name: str, mixture_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="OWNER/NAME"):
        check_repository(name)
    with pytest.raises(ExportError):
        write_repository(mixture_folder, name, tmp_path / "out")
