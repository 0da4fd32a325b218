"""What of Python's installation programs may read."""

import os
import subprocess
import sys
from pathlib import Path

from dylora_moe.sandbox.installation import find_installation


def test_it_is_a_python_outside_virtual_environments() -> None:
    found = find_installation()
    code = "import sys; print(sys.prefix == sys.base_prefix, sys.version_info[:2])"
    said = subprocess.run([found.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == f"True {sys.version_info[:2]}\n"


def test_it_is_neither_the_home_nor_packages() -> None:
    found = find_installation()
    standard = Path(os.__file__).resolve().parent
    assert any(standard.is_relative_to(Path(path).resolve()) for path in found.readable)
    for path in map(Path, found.readable):
        assert path.is_absolute() and not Path.home().is_relative_to(path) and path != Path(sys.base_prefix)
    packages = [*standard.glob("site-packages"), *standard.glob("dist-packages")]
    assert {path.resolve() for path in packages} <= {Path(path).resolve() for path in found.hidden}
