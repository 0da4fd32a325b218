"""A hub model id -> a folder with one commit's files, or an error that says what to do."""

import socket
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dylora_moe.bases.embedded import EMBEDDED
from dylora_moe.cache.disk import chain, disk_full_error, is_disk_full
from dylora_moe.errors import BaseModelError, CacheError

_TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]
# These names only: repositories also hold copies of the same weights as pickles, in other precisions and formats.
_WEIGHT_FILES = ["model.safetensors", "model-*.safetensors"]
_MIXTURE_FILES = [
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "router.safetensors",
    "experts/*/adapter_config.json",
    "experts/*/adapter_model.safetensors",
]


def fetch_snapshot(name: str, *, revision: str | None, weights: bool) -> Path:
    """Download the files of a hub model that are needed, or find them in the hub's own cache.

    Args:
        name: hub id, such as `org/model`.
        revision: commit, branch or tag; None is the main branch.
        weights: whether to fetch more than config and tokenizer.

    Returns:
        The folder in the hub's cache; its name is the commit's hash.

    Raises:
        BaseModelError: gated, not found, or unreachable.
        CacheError: no disk space.
    """
    return _download(name, revision, _TEXT_FILES + (_WEIGHT_FILES if weights else []), ["*/*"], "Base model")


def fetch_mixture(name: str, description: str) -> Path:
    """Download a mixture of experts, or find it in the hub's own cache: no code and no pickle.

    Args:
        name: hub id, such as `owner/name`.
        description: The file by which a mixture is known.

    Raises:
        BaseModelError: gated, not found, unreachable, or no mixture.
        CacheError: no disk space.
    """
    folder = _download(name, None, _MIXTURE_FILES, None, "Model")
    if not (folder / description).is_file():
        raise BaseModelError(
            f"Model {name!r} must hold {description} to be a mixture of experts, got a model without. "
            "Load it with transformers, or give the id of a mixture."
        )
    return folder


def _download(name: str, revision: str | None, allow: list[str], ignore: list[str] | None, what: str) -> Path:
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=allow, ignore_patterns=ignore)
    # Broad, because the hub's client lets the errors of its HTTP library through, and that library changes.
    except Exception as error:
        raise _explain(name, revision, error, what) from error
    return Path(folder)


def _explain(name: str, revision: str | None, error: Exception, what: str) -> BaseModelError | CacheError:
    links = list(chain(error))
    statuses = {link.response.status_code for link in links if isinstance(link, HfHubHTTPError)}
    is_base = what == "Base model"
    instead = f"or give a local folder, or an embedded base ({', '.join(EMBEDDED)})" if is_base else "or give a folder"
    expected = "a hub id, an existing folder or an embedded base" if is_base else "a hub id or an existing folder"
    if is_disk_full(error):
        return disk_full_error(Path(constants.HF_HUB_CACHE), f"Downloading {name!r}")
    if any(isinstance(link, GatedRepoError) for link in links):
        return BaseModelError(
            f"{what} {name!r} is gated on the hub, and access was refused. Accept its licence on its hub page "
            f"and set HF_TOKEN to a token of that account, {instead}."
        )
    if any(isinstance(link, RevisionNotFoundError) for link in links):
        return BaseModelError(
            f"Revision {revision!r} must exist in the hub model {name!r}, got none of that name. "
            "Give a commit, branch or tag that its hub page lists."
        )
    if any(isinstance(link, RepositoryNotFoundError | HFValidationError) for link in links):
        return BaseModelError(
            f"{what} {name!r} must be {expected}, got none of them (a "
            f"private hub model looks the same). Correct the name, set HF_TOKEN if the model is private, {instead}."
        )
    if statuses & {401, 403}:
        return BaseModelError(
            f"The hub must grant access to {name!r}, got HTTP {max(statuses)}. Accept its licence on its hub page "
            f"if it has one and set HF_TOKEN to a valid token, {instead}."
        )
    return BaseModelError(
        f"The hub must be reachable to fetch {name!r}, which is not complete in the local cache; got {_cause(links)}. "
        f"Check the network (HF_ENDPOINT, HTTPS_PROXY), {instead}."
    )


def _cause(links: list[BaseException]) -> str:
    """The innermost error's kind. Its text is left out: it can hold addresses with credentials in them."""
    if constants.HF_HUB_OFFLINE:
        return "offline mode (HF_HUB_OFFLINE is set)"
    status = next((link.response.status_code for link in links if isinstance(link, HfHubHTTPError)), None)
    if isinstance(links[-1], socket.gaierror):
        return "no address for its host name"
    return f"HTTP {status}" if status else type(links[-1]).__name__
