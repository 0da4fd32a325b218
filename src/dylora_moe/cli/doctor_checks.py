"""What `dylora doctor` looks at: this machine -> findings, each with the command that repairs it. Tells no secret."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import urlsplit

from dylora_moe.cache.store import cache_folder
from dylora_moe.cli.doctor_versions import PACKAGE, look_at_versions, pinned_versions
from dylora_moe.sandbox import try_back_end

Colour = Literal["green", "yellow", "red"]
T = TypeVar("T")

_TESTED_PYTHONS = ((3, 10), (3, 11))
_CHECKOUT = Path(__file__).resolve().parents[3]  # where this runs from its sources
_GB = 10**9
# What `make quickstart` needs, downloads included, and what is too little to prepare any base.
_DISK_ROOM, _DISK_LEAST = 10 * _GB, 2 * _GB
_MEMORY_ROOM, _MEMORY_LEAST = 6 * _GB, 2 * _GB
_HUB_SECONDS, _PROBE_SECONDS = 5.0, 60.0
_NO_ADDRESS = "HF_ENDPOINT, which is no address,"
_CREDENTIALS = "GOOGLE_APPLICATION_CREDENTIALS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor.

    Attributes:
        check: What was looked at, in a word or two.
        colour: `green`, it works; `yellow`, it works but for something; `red`, it does not.
        found: What there is, in a sentence or less.
        repair: The command that mends it; empty where nothing is to be mended.
    """

    check: str
    colour: Colour
    found: str
    repair: str = ""


class _Later(Generic[T]):
    """A look that takes a while, begun now. A thread that hangs keeps no process from ending."""

    def __init__(self, look: Callable[[], T]) -> None:
        self._found: list[T | Exception] = []
        self._thread = threading.Thread(target=self._run, args=(look,), daemon=True)
        self._thread.start()

    def _run(self, look: Callable[[], T]) -> None:
        try:
            self._found.append(look())
        except Exception as error:
            self._found.append(error)

    def get(self, seconds: float) -> T | Exception:
        """What it found, the error that it met, or TimeoutError."""
        self._thread.join(seconds)
        return self._found[0] if self._found else TimeoutError(f"no answer in {seconds:.0f} s")


def look(environment: Mapping[str, str], output_dir: Path) -> Iterator[Finding]:
    """Findings in the order in which they are shown; the slow ones begin first and come last.

    Args:
        environment: Variables as the process has them.
        output_dir: Where runs would be written.
    """
    probe = _Later(_probe)
    hub = _Later(lambda: _ask_hub(environment))
    walls = _Later(lambda: {name: try_back_end(name) for name in ("bubblewrap", "sandlock")})
    yield _python()
    yield _packages()
    yield _disk("cache", cache_folder(None, environment), "export DYLORA_CACHE=/a/folder/on/a/larger/disk")
    yield _disk("run folder", output_dir, "dylora train RECIPE --output_dir /a/folder/that/can/be/written")
    yield _pip()
    yield _vertex(environment)
    yield _sandbox(walls.get(30))
    yield from _hub(hub.get(_HUB_SECONDS + 3), environment)
    yield from _torch(probe.get(_PROBE_SECONDS + 5))


def _python() -> Finding:
    found = sys.version_info[:2]
    named = f"{platform.python_version()} at {sys.executable}"
    newest = ".".join(map(str, _TESTED_PYTHONS[-1]))
    own = f"-e {shlex.quote(str(_CHECKOUT))}" if (_CHECKOUT / "pyproject.toml").is_file() else PACKAGE
    repair = f"python{newest} -m venv .venv && .venv/bin/python -m pip install {own}"
    if found < _TESTED_PYTHONS[0]:
        return Finding(check="python", colour="red", found=f"{named}; 3.10 or later is needed", repair=repair)
    if found not in _TESTED_PYTHONS:
        return Finding(check="python", colour="yellow", found=f"{named}; tested is {newest}", repair=repair)
    return Finding(check="python", colour="green", found=named)


def _packages() -> Finding:
    try:
        own = version(PACKAGE)
    except PackageNotFoundError:
        own = "from its sources, not installed"
    versions = look_at_versions()
    needed = f"{PACKAGE} {own}, {versions.needed} packages"
    if versions.missing or versions.outside:
        parts = [
            f"{what}: {_some(names)}"
            for what, names in (("missing", versions.missing), ("not a version that works", versions.outside))
            if names
        ]
        return Finding(
            check="packages",
            colour="red",
            found=f"{needed}; {'; '.join(parts)}",
            repair=_pip_install((*versions.missing, *versions.outside)),
        )
    if not pinned_versions():
        return Finding(
            check="packages",
            colour="yellow",
            found=f"{needed}; the list of tested versions is not here",
            repair="python -m pip install --force-reinstall --no-deps dylora-moe",
        )
    if versions.other:
        told = f"{needed}; other versions than tested, tested are {_some(versions.other)}"
        return Finding(check="packages", colour="yellow", found=told, repair=_pip_install(versions.other))
    return Finding(check="packages", colour="green", found=f"{needed}, all as tested")


def _pip_install(wanted: tuple[str, ...]) -> str:
    return "python -m pip install " + " ".join(f'"{name}"' for name in wanted)


def _some(names: tuple[str, ...], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _disk(check: str, folder: Path, repair: str) -> Finding:
    """A folder that must be writable and have room, whether it is there yet or not."""
    try:
        there = folder.absolute()
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is no folder")
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(
            check=check, colour="red", found=f"{folder} cannot be written: {error.strerror or error}", repair=repair
        )
    told = f"{folder}, {free / _GB:.1f} GB free"
    if free < _DISK_ROOM:
        colour: Colour = "red" if free < _DISK_LEAST else "yellow"
        return Finding(check=check, colour=colour, found=f"{told}; 10 GB are good to have", repair=repair)
    return Finding(check=check, colour="green", found=told)


def _pip() -> Finding:
    if find_spec("pip") is None:
        return Finding(
            check="pip",
            colour="yellow",
            found="not in this environment; it fetches the embedded bases",
            repair="python -m ensurepip",
        )
    return Finding(check="pip", colour="green", found="there, for the embedded bases")


def _vertex(environment: Mapping[str, str]) -> Finding:
    """Only whether credentials are there and of what kind; nothing is asked of the cloud."""
    login = "gcloud auth application-default login"
    named = environment.get(_CREDENTIALS)
    folder = environment.get("CLOUDSDK_CONFIG") or "~/.config/gcloud"
    path = Path(os.path.expanduser(named or f"{folder}/application_default_credentials.json"))  # also without a home
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["type"]
    except FileNotFoundError:
        if named:
            told = f"{_CREDENTIALS} names a file that is not there"
            return Finding(check="vertex", colour="red", found=told, repair=f"unset {_CREDENTIALS} && {login}")
        told = "no credentials of Google Cloud; only runs on Vertex AI need them"
        return Finding(check="vertex", colour="yellow", found=told, repair=login)
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = f"the credentials at {path} cannot be read ({type(error).__name__})"
        return Finding(check="vertex", colour="red", found=told, repair=login)
    if not _has_module("google.cloud.aiplatform"):
        told = f"credentials ({kind}), but not the package that sends jobs"
        repair = "python -m pip install 'dylora-moe[vertex]'"
        return Finding(check="vertex", colour="yellow", found=told, repair=repair)
    return Finding(check="vertex", colour="green", found=f"credentials ({kind})")


def _has_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _sandbox(found: Any) -> Finding:
    repair = "apt-get install bubblewrap"
    if isinstance(found, Exception):
        return Finding(check="sandbox", colour="yellow", found=f"could not be tried: {found}", repair=repair)
    if found["bubblewrap"].sandbox is not None:
        return Finding(check="sandbox", colour="green", found="bubblewrap works; `dylora doctor sandbox` attacks it")
    why = found["bubblewrap"].reason
    if found["sandlock"].sandbox is not None:
        told = f"sandlock works, bubblewrap does not: {why}"
        return Finding(check="sandbox", colour="green", found=told)
    told = f"none works, so no code of a model is run: {why}"
    return Finding(
        check="sandbox", colour="yellow", found=told, repair=f"{repair} && python -m pip install 'dylora-moe[sandbox]'"
    )


def _ask_hub(environment: Mapping[str, str]) -> tuple[bool, int, str]:
    """(is there a token, status of the answer, name of the account), by the hub's own client; one request."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import build_hf_headers, get_session

    token = get_token()
    if constants.HF_HUB_OFFLINE:
        return token is not None, 0, ""
    answer = get_session().get(
        f"{constants.ENDPOINT}/api/whoami-v2",
        headers=build_hf_headers(token=token or False),
        timeout=_HUB_SECONDS,
    )
    is_known = token is not None and answer.status_code == 200
    return token is not None, answer.status_code, str(answer.json().get("name", "")) if is_known else ""


def _hub(found: Any, environment: Mapping[str, str]) -> Iterator[Finding]:
    host = _host(environment.get("HF_ENDPOINT") or "https://huggingface.co")
    embedded = "embedded bases and local folders do without"
    has_token = bool(environment.get("HF_TOKEN")) if isinstance(found, Exception) else found[0]
    if isinstance(found, ModuleNotFoundError):  # which the packages tell, with the command
        told, repair = f"not asked, for want of {found.name}", f"python -m pip install {found.name}"
        yield Finding(check="hub", colour="yellow", found=told, repair=repair)
    elif isinstance(found, Exception):
        told = f"{host} cannot be reached ({type(found).__name__}); {embedded}"
        repair = "export HTTPS_PROXY=http://YOUR-PROXY:PORT" if host != _NO_ADDRESS else "unset HF_ENDPOINT"
        yield Finding(check="hub", colour="yellow", found=told, repair=repair)
    elif found[1] == 0:
        told = f"offline mode; {embedded}"
        yield Finding(check="hub", colour="yellow", found=told, repair="unset HF_HUB_OFFLINE")
    elif found[1] in (200, 401, 403):
        yield Finding(check="hub", colour="green", found=f"{host} answers")
    else:
        told = f"{host} answers with HTTP {found[1]}; {embedded}"
        yield Finding(check="hub", colour="yellow", found=told, repair="dylora doctor  # in a while, again")
    login = "hf auth login"
    if not has_token:
        told = "none; gated and private bases need one"
        yield Finding(check="hub token", colour="yellow", found=told, repair=login)
    elif isinstance(found, Exception) or found[1] not in (200, 401, 403):
        told = "there; whether it is valid could not be asked"
        yield Finding(check="hub token", colour="yellow", found=told, repair="dylora doctor  # when the hub is reached")
    elif found[1] == 200:
        yield Finding(check="hub token", colour="green", found=f"valid, of the account {found[2]}")
    else:
        told = "there, and the hub refuses it, public models included"
        yield Finding(check="hub token", colour="red", found=told, repair=f"unset HF_TOKEN && {login}")


def _host(address: str) -> str:
    """Of an address, without what else may stand in it."""
    try:
        return urlsplit(address).hostname or _NO_ADDRESS
    except ValueError:
        return _NO_ADDRESS


def _probe() -> dict[str, Any] | str:
    """What torch tells in a process of its own, or the last line of why it could not."""
    with tempfile.TemporaryDirectory() as nowhere:  # a folder `torch` where the user stands is not torch
        finished = subprocess.run(
            [sys.executable, "-c", "from dylora_moe.cli.doctor_probe import main; main()"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS,
            cwd=nowhere,
            env={**os.environ, "PYTHONPATH": _absolute(os.environ.get("PYTHONPATH", ""))},
        )
    if finished.returncode == 0:
        return json.loads(finished.stdout.splitlines()[-1])
    lines = finished.stderr.strip().splitlines()
    return lines[-1] if lines else f"the process ended with code {finished.returncode}"


def _absolute(paths: str) -> str:
    return os.pathsep.join(os.path.abspath(path) for path in paths.split(os.pathsep) if path)


def _torch(found: Any) -> Iterator[Finding]:
    """Torch, what it computes on, and memory."""
    pin = pinned_versions().get("torch")
    install = f'python -m pip install "torch=={pin}"' if pin else "python -m pip install torch"
    if not isinstance(found, dict):
        yield Finding(
            check="torch", colour="red", found=f"cannot be used: {found}", repair=f"{install} --force-reinstall"
        )
        return
    told = f"{found['torch']}, {found['threads']} threads"
    if not found["grouped_mm"]:
        yield Finding(check="torch", colour="red", found=f"{told}; it lacks grouped_mm", repair=install)
    else:
        yield Finding(check="torch", colour="green", found=told)
    yield _gpu(found, install)
    available = found["available"]
    told = f"{available / _GB:.1f} GB available"
    if available < _MEMORY_ROOM:
        colour: Colour = "red" if available < _MEMORY_LEAST else "yellow"
        repair = "dylora train RECIPE --scenario memory_constrained --dry-run"
        yield Finding(check="memory", colour=colour, found=f"{told}; 8 GB are good to have", repair=repair)
    else:
        yield Finding(check="memory", colour="green", found=told)


def _gpu(found: Mapping[str, Any], install: str) -> Finding:
    if found["kind"] == "cuda":
        memory, free = found["device_memory"] / _GB, found["device_free"] / _GB
        precision = "bfloat16" if found["bf16"] else "no bfloat16"
        told = f"{found['device']}, {memory:.0f} GB, {free:.0f} GB free, {precision}, preset {found['preset']}"
        if free < memory / 2:
            told += "; other processes hold more than half"
            return Finding(check="gpu", colour="yellow", found=told, repair="nvidia-smi  # shows them")
        return Finding(check="gpu", colour="green", found=told)
    if cards := _cards():
        told = f"{cards} is here, and this build of torch ({found['torch']}) cannot use it"
        repair = f"{install} --force-reinstall --index-url https://pypi.org/simple"
        return Finding(check="gpu", colour="yellow", found=told, repair=repair)
    if found["kind"] == "mps":
        told = f"{found['device']}; this version computes on the CPU of a Mac, preset {found['preset']}"
        return Finding(check="gpu", colour="green", found=told)
    return Finding(check="gpu", colour="green", found="none; all is computed on the CPU, preset cpu")


def _cards() -> str:
    """Names of Nvidia cards that the system knows of, whatever torch does."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        finished = subprocess.run(
            [tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ", ".join(dict.fromkeys(finished.stdout.split("\n"))).strip(", ") if finished.returncode == 0 else ""
