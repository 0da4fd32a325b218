"""A trained run -> a repository of the hub: the model folder and a card; what is sent is written to a folder first."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from dylora_moe.errors import ExportError
from dylora_moe.evaluate.load import find_model
from dylora_moe.export.card import base_name, model_card
from dylora_moe.report.records import read_run
from dylora_moe.run_dir import CONFIG
from dylora_moe.tuner.folder import (
    ADAPTER_CONFIG,
    EXPERTS_FOLDER,
    MODEL_FILE,
    ROUTER_FILE,
    copy_adapter,
    copy_tokenizer,
    read_description,
    written_whole,
)

CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One file of a repository."""

    name: str
    size: int


def check_repository(repository: str) -> None:
    """See that a name is a hub id.

    Raises:
        ExportError: It is not.
    """
    part = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9])?"
    if not re.fullmatch(f"{part}/{part}", repository) or "--" in repository or ".." in repository:
        raise ExportError(f"a repository is named OWNER/NAME, of letters, digits, -, _ and ., got {repository!r}.")


def write_repository(place: Path, repository: str, folder: Path) -> list[Sent]:
    """Write what would be sent: the model's own files, which are known by name, and the card; nothing else of the run.

    A base that was a folder is named without the path to it, which is this machine's business.

    Args:
        place: A run, or a model folder.
        repository: Its hub id.
        folder: New or empty.

    Raises:
        TunerError: No model is there, or the folder is not empty.
        RunError: The run is not finished.
        ExportError: The name is no hub id.
    """
    check_repository(repository)
    source = find_model(place)
    run = read_run(place) if (place / CONFIG).is_file() else None
    with written_whole(folder) as target:
        description = read_description(source)
        base = base_name(description["base"], description.get("base_revision"))
        shutil.copyfile(source / MODEL_FILE, target / MODEL_FILE)
        _change(target / MODEL_FILE, base=base)
        if (source / ROUTER_FILE).is_file():
            shutil.copyfile(source / ROUTER_FILE, target / ROUTER_FILE)
        for expert in description["experts"]:
            place = target / EXPERTS_FOLDER / expert["name"]
            copy_adapter(source, expert["name"], place)
            _change(place / ADAPTER_CONFIG, base_model_name_or_path=base)
        copy_tokenizer(source, target)
        (target / CARD).write_text(model_card(source, repository, run), encoding="utf-8")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [Sent(name=path.relative_to(folder).as_posix(), size=path.stat().st_size) for path in paths]


def _change(path: Path, **values: str) -> None:
    changed = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def push(folder: Path, repository: str, *, public: bool) -> str:
    """Send a folder in one commit; gives the address of the repository.

    The token is that of HF_TOKEN, or of a login of the hub's own client.

    Args:
        folder: As `write_repository` made it.
        repository: Its hub id; made where it is not there.
        public: Who may see it. A repository that is there keeps what it is.

    Raises:
        ExportError: The hub refuses, cannot be reached, or the repository is public and should not be.
    """
    api = HfApi()
    try:
        url = api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.model_info(repository).private:
            raise ExportError(
                f"{repository} is there and public, so everyone would see what is sent. Send it with --public, make "
                "it private on the hub, or choose another name."
            )
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Add the model and its card")
    except ExportError:
        raise
    # Broad, because the hub's client lets the errors of its HTTP library through; their texts may hold addresses.
    except Exception as error:
        raise ExportError(f"{repository} must be writable on the hub, and {_cause(error)}") from error
    return str(url)


def _cause(error: Exception) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "it wants a token: set HF_TOKEN to one that may write, or log in with `hf auth login`."
    if status == 403:
        return "the token may not write there: take one with write access to it, or another owner."
    return f"it answered {f'HTTP {status}' if status else type(error).__name__}. Check the network and HF_ENDPOINT."
