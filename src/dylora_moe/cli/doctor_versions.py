"""Which versions the tests ran with, what is installed -> packages that are missing, out of range, or others."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

PACKAGE = "dylora-moe"
_NAME = "constraints.txt"
_OURS = Path(__file__).resolve().parents[1]
# Of a package that runs from its sources without being installed, whose requirements nobody wrote down.
_ALWAYS = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface-hub")


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """What is installed of what is needed.

    Attributes:
        needed: How many packages were looked at.
        missing: Requirements of which nothing is installed, as pip takes them.
        outside: Requirements that another version than allowed is installed of.
        other: Pins that another version, which is allowed, is installed of.
    """

    needed: int
    missing: tuple[str, ...]
    outside: tuple[str, ...]
    other: tuple[str, ...]


def pinned_versions() -> dict[str, str]:
    """Package -> the version that the tests ran with on this Python.

    They are those of `constraints.txt`, which lies in the installed package, and at the top of a checkout.
    """
    places = (_OURS / _NAME, _OURS.parents[1] / _NAME)
    text = next((place.read_text(encoding="utf-8") for place in places if place.is_file()), "")
    pins = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate():
            pins[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    return pins


def look_at_versions() -> Versions:
    """Compare the packages that this one needs, extras aside, with what is allowed and what was tested."""
    pins, missing, outside, other = pinned_versions(), [], [], []
    needed = list(_needed())
    for requirement in needed:
        pin = pins.get(canonicalize_name(requirement.name))
        wanted = f"{requirement.name}=={pin}" if pin else str(requirement)
        try:
            found = Version(version(requirement.name))
        except (PackageNotFoundError, InvalidVersion):
            missing.append(wanted)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            outside.append(wanted)
        elif pin and found.public != Version(pin).public:
            other.append(wanted)
    return Versions(needed=len(needed), missing=tuple(missing), outside=tuple(outside), other=tuple(other))


def _needed() -> Iterator[Requirement]:
    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:
        lines = list(_ALWAYS)
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement
