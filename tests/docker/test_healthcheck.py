"""The image's question whether a container is well, asked of real processes."""

import http.server
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tests.docker.dockerfile import ROOT

pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="there is no /proc here")


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("healthcheck", ROOT / "docker" / "healthcheck.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Health(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Health)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def code_of(check: ModuleType, *arguments: str) -> int:
    """What the check says of a container whose first process has these arguments."""
    sleeps = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", "dylora", *arguments]
    with subprocess.Popen(sleeps, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # its command line is there only once it runs
        try:
            return check.main(str(process.pid))
        finally:
            process.kill()


def test_a_server_that_answers_is_well(check: ModuleType, port: int) -> None:
    assert code_of(check, "serve", "runs/a", "--host", "0.0.0.0", "--port", str(port)) == 0
    assert code_of(check, "serve", "runs/a", f"--port={port}") == 0


def test_one_that_does_not_is_not(check: ModuleType, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Health, "status", 503)
    assert code_of(check, "serve", "runs/a", "--port", str(port)) == 1
    assert code_of(check, "serve", "runs/a", "--port", "1") == 1


def test_a_container_that_trains_is_well(check: ModuleType) -> None:
    assert code_of(check, "train", "recipes/full.yaml") == 0
    assert check.port_of(["dylora", "serve", "runs/a"]) == 8000
