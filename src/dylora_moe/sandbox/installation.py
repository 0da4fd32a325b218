"""Where Python lies on this machine -> the little of it that a program without packages needs to read."""

import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Shared libraries, the loader's list of them and time zones: a system's public files.
_SYSTEM = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """A Python outside any virtual environment, so that no project's packages come with it."""

    executable: str
    readable: tuple[str, ...]
    """Folders and files, absolute; `executable` among them."""
    hidden: tuple[str, ...]
    """Folders below them that hold packages: not readable."""


def find_installation() -> Installation:
    """The Python that this process runs on, or that its virtual environment was made of."""
    base = Path(sys.base_prefix)
    named = base / "bin" / f"python{sysconfig.get_python_version()}"
    executable = os.path.realpath(named if named.is_file() else sys.executable)
    # A Python beside the system's has its libraries in its own folder, and the standard library below them.
    folders = [*map(Path, _SYSTEM), base / "lib", base / "lib64", Path(os.__file__).parent]
    found = [folder for folder in folders if folder.exists()]
    outermost = [folder for folder in found if not any(other in folder.parents for other in found)]
    packages = (
        path for folder in outermost for kind in ("site", "dist") for path in folder.glob(f"python3*/{kind}-packages")
    )
    return Installation(
        executable=executable,
        readable=tuple(dict.fromkeys([executable, *map(str, outermost)])),
        hidden=tuple(sorted({str(path) for path in packages})),
    )
