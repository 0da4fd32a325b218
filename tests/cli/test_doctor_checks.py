"""`dylora doctor` on machines with a fault each: the fault is told, with its command, and nothing secret."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import SOURCE

from dylora_moe.cli import doctor_checks, doctor_versions
from dylora_moe.cli.doctor_versions import pinned_versions

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "s3cretword" * 3
DOCTOR = """
import sys
from dylora_moe.cli.main import main
try:
    main(["doctor", *sys.argv[1:]])
except SystemExit as exit:
    assert "torch" not in sys.modules
    sys.exit(exit.code)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> dict[str, dict[str, str]]:
        """Check -> its finding, of `--json`."""
        return {each["check"]: each for each in json.loads(self.out)["findings"]}


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a server on this machine that knows one token, as the hub does."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = self.headers.get("Authorization")
            is_known = self.path == "/api/whoami-v2" and said == f"Bearer {TOKEN}"
            body = json.dumps({"name": "somebody"} if is_known else {"error": "no"}).encode()
            self.send_response(200 if is_known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def doctor(hub: str, tmp_path: Path) -> Callable[..., Told]:
    """(*arguments, **variables) -> what a new process tells, in a home of its own; a variable None is not set."""

    def run(*arguments: str, **variables: str | None) -> Told:
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        own = {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub, "HF_TOKEN": TOKEN}
        values = {**os.environ, **own, "PYTHONPATH": str(SOURCE), "DYLORA_CACHE": str(home / "cache"), **variables}
        for name in ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG", "HF_HUB_OFFLINE"):
            values[name] = variables.get(name)
        environment = {name: value for name, value in values.items() if value is not None}
        command = [sys.executable, "-c", DOCTOR, *arguments]
        ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        return Told(code=ended.returncode, out=ended.stdout, err=ended.stderr)

    return run


def test_a_machine_that_is_well(doctor: Callable[..., Told], tmp_path: Path) -> None:
    """Also where somebody's own file is named as a package is; of credentials the kind alone is told."""
    (tmp_path / "torch.py").write_text("raise ImportError('not this one')")
    key = tmp_path / "key.json"
    key.write_text(json.dumps({"type": "service_account", "private_key": "a secret key"}))
    told = doctor("--json", GOOGLE_APPLICATION_CREDENTIALS=str(key))
    lines = told.lines
    assert told.code == 0 and json.loads(told.out)["well"] is True
    names = "python packages cache run-folder pip vertex sandbox hub hub-token torch gpu memory"
    assert [name.replace(" ", "-") for name in lines] == names.split()
    assert lines["hub token"]["found"] == "valid, of the account somebody"
    assert lines["torch"]["colour"] == "green" and lines["torch"]["found"].startswith(version("torch"))
    assert "service_account" in lines["vertex"]["found"]
    assert TOKEN not in told.out + told.err and "a secret key" not in told.out + told.err
    assert all(each["repair"] for each in lines.values() if each["colour"] != "green")
    left = sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__")
    assert left == ["home", "key.json", "torch.py"]  # no runs/ was made


def test_people_read_lines(doctor: Callable[..., Told]) -> None:
    told = doctor(HF_TOKEN=None)
    assert told.code == 0 and told.err == ""
    assert "yellow  hub token   none; gated and private bases need one\n" in told.out
    assert "\n                    hf auth login\n" in told.out
    assert told.out.splitlines()[-1].endswith("0 red")


def test_faults_are_red(doctor: Callable[..., Told]) -> None:
    told = doctor(
        "--json",
        HF_TOKEN=TOKEN + "x",
        GOOGLE_APPLICATION_CREDENTIALS="/nowhere/key.json",
        DYLORA_CACHE="/dev/null/cache",
    )
    assert told.code == 1 and json.loads(told.out)["well"] is False
    red = {name: each for name, each in told.lines.items() if each["colour"] == "red"}
    assert list(red) == ["cache", "vertex", "hub token"] and all(each["repair"] for each in red.values())
    assert "cannot be written" in red["cache"]["found"] and "refuses it" in red["hub token"]["found"]
    assert "names a file that is not there" in red["vertex"]["found"]
    assert TOKEN not in told.out + told.err


def test_a_hub_that_is_not_reached_is_yellow(doctor: Callable[..., Told], tmp_path: Path) -> None:
    """The address is a port on which nobody listens, with a name and a password in it. A broken key is not shown."""
    key = tmp_path / "key.json"
    key.write_text("no JSON, but a secret key")
    address = "http://me:passw0rd@127.0.0.1:9"
    told = doctor("--json", HF_ENDPOINT=address, GOOGLE_APPLICATION_CREDENTIALS=str(key))
    lines = told.lines
    assert lines["hub"]["colour"] == lines["hub token"]["colour"] == "yellow" and lines["vertex"]["colour"] == "red"
    assert "127.0.0.1 cannot be reached" in lines["hub"]["found"]
    assert "passw0rd" not in told.out + told.err and "a secret key" not in told.out + told.err


def test_a_torch_that_breaks_is_red(doctor: Callable[..., Told], tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libsomething.so: cannot open')")
    told = doctor("--json", HF_HUB_OFFLINE="1", PYTHONPATH=f"{SOURCE}{os.pathsep}{broken.parent}")
    assert told.code == 1 and told.lines["torch"]["colour"] == "red"
    assert "libsomething.so" in told.lines["torch"]["found"]
    assert f'"torch=={pinned_versions()["torch"]}"' in told.lines["torch"]["repair"]
    assert "gpu" not in told.lines  # nobody could tell
    assert told.lines["hub"]["colour"] == "yellow" and told.lines["hub"]["repair"] == "unset HF_HUB_OFFLINE"


CARD = {
    "torch": "2.13.0",
    "cuda": "13.0",
    "threads": 4,
    "grouped_mm": True,
    "kind": "cuda",
    "device": "NVIDIA H100 80GB HBM3",
    "device_memory": 85 * 10**9,
    "device_free": 80 * 10**9,
    "bf16": True,
    "preset": "h100",
    "available": 10**11,
}


def test_a_gpu_is_told_with_its_preset() -> None:
    """What the process with torch would tell of one; the machine that wrote this had none."""
    found = {each.check: each for each in doctor_checks._torch(CARD)}
    assert found["gpu"].colour == "green" and "preset h100" in found["gpu"].found and "bfloat16" in found["gpu"].found
    busy = {each.check: each for each in doctor_checks._torch(CARD | {"device_free": 10**9, "available": 10**9})}
    assert (busy["gpu"].colour, busy["memory"].colour) == ("yellow", "red")


def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA L4'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = doctor_checks._gpu(CARD | {"kind": "cpu", "torch": "2.13.0+cpu"}, 'python -m pip install "torch==2.13.0"')
    assert found.colour == "yellow" and "NVIDIA L4 is here" in found.found
    assert found.repair.startswith('python -m pip install "torch==2.13.0" --force-reinstall')


def test_versions_are_those_of_the_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pins = pinned_versions()
    assert pins["torch"] and pins["huggingface-hub"]
    assert len(pins) > 100
    monkeypatch.setattr(doctor_versions, "requires", lambda name: ["torch>=2", "numpy>=99", "no-such-package>=1"])
    monkeypatch.setattr(doctor_versions, "pinned_versions", lambda: pins | {"torch": "2.0.0"})
    found = doctor_versions.look_at_versions()
    assert found.other == ("torch==2.0.0",)
    assert found.outside == (f"numpy=={pins['numpy']}",) and found.missing == ("no-such-package>=1",)


def test_the_list_ships_with_the_package() -> None:
    """A wheel has it where `pinned_versions` looks first."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"constraints.txt" = "dylora_moe/constraints.txt"' in text


@pytest.mark.parametrize("address", ["http://[bad", "nowhere"])
def test_an_address_of_the_hub_that_is_none_is_told(doctor: Callable[..., Told], address: str) -> None:
    told = doctor("--json", HF_ENDPOINT=address)
    assert told.lines["hub"]["colour"] == "yellow" and "HF_ENDPOINT, which is no address" in told.lines["hub"]["found"]
    assert told.lines["hub"]["repair"] == "unset HF_ENDPOINT"


def test_a_folder_that_was_deleted_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one in which the user stands."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    found = doctor_checks._disk("run folder", Path("runs"), "cd")
    assert found.colour == "red" and "No such file or directory" in found.found


@pytest.mark.parametrize("name", ["filelock", "packaging", "huggingface_hub"])
def test_a_package_that_is_missing_is_red(doctor: Callable[..., Told], tmp_path: Path, name: str) -> None:
    """Also one that the doctor itself is made with."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / f"{name}.py").write_text(f"raise ModuleNotFoundError('none', name='{name}')")
    told = doctor("--json", PYTHONPATH=f"{SOURCE}{os.pathsep}{broken}")
    assert told.code == 1 or name == "huggingface_hub", told.err
    if name == "huggingface_hub":
        assert told.lines["hub"]["repair"] == "python -m pip install huggingface_hub"
    else:
        assert told.lines["packages"]["colour"] == "red" and name in told.lines["packages"]["repair"]


def test_another_python_is_told_with_a_command_that_finds_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """No index has it: it is installed from its checkout."""
    monkeypatch.setattr(sys, "version_info", (3, 13, 0, "final", 0))
    found = doctor_checks._python()
    assert found.colour == "yellow" and found.repair.endswith(f"pip install -e {ROOT}")


def test_a_user_without_a_home_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a number without a name in a container is."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    found = doctor_checks._vertex({})
    assert found.colour == "yellow" and "no credentials" in found.found
