"""Names of secrets go into a job, secrets do not."""

import json

import pytest

from dylora_moe.cloud.secrets import VARIABLE, check_no_secrets, fetched, resource_of
from dylora_moe.errors import CloudError

TOKEN = "hf_" + "aB3" * 11


def test_a_short_name_means_the_newest_version_in_the_project() -> None:
    assert resource_of("HF_TOKEN=hf-token", "mine", {}) == (
        "HF_TOKEN",
        "projects/mine/secrets/hf-token/versions/latest",
    )


def test_a_full_name_is_taken_as_it_is() -> None:
    full = "projects/other/secrets/wandb/versions/3"
    assert resource_of(f"WANDB_API_KEY={full}", "mine", {}) == ("WANDB_API_KEY", full)


@pytest.mark.parametrize(
    ("secret", "environ"), [(TOKEN, {}), ("plainword", {"ANY_KEY": "plainword"}), ("other", {"HF_TOKEN": "other"})]
)
def test_the_secret_itself_is_refused_and_not_repeated(secret: str, environ: dict[str, str]) -> None:
    with pytest.raises(CloudError, match="the secret itself") as caught:
        resource_of(f"HF_TOKEN={secret}", "mine", environ)
    assert secret not in str(caught.value)


@pytest.mark.parametrize("given", [TOKEN, f"{TOKEN}=hf-token", "plainword", "plainword=hf-token"])
def test_a_secret_in_the_place_of_the_variable_is_refused_and_not_repeated(given: str) -> None:
    """As by `--secret $HF_TOKEN`."""
    with pytest.raises(CloudError, match="--secret must be VARIABLE=NAME") as caught:
        resource_of(given, "mine", {"HF_TOKEN": "plainword"})
    assert given.partition("=")[0] not in str(caught.value)


def test_a_name_that_is_a_word_of_the_environment_is_a_name() -> None:
    assert resource_of("HF_TOKEN=root", "mine", {"USER": "root"})[1] == "projects/mine/secrets/root/versions/latest"


@pytest.mark.parametrize(
    "given", ["HF_TOKEN", "HF_TOKEN=", "=name", "HF TOKEN=name", "HF_TOKEN=a name", "A=projects/p/x"]
)
def test_another_form_is_refused(given: str) -> None:
    with pytest.raises(CloudError, match="VARIABLE=NAME"):
        resource_of(given, "mine", {})


@pytest.mark.parametrize(
    "text", [f"note: {TOKEN}", "path: https://me:word@host/rows.jsonl", "url: https://h/?token=abc"]
)
def test_a_text_with_a_secret_is_refused(text: str) -> None:
    with pytest.raises(CloudError, match="must hold no password") as caught:
        check_no_secrets(text, "a recipe")
    assert TOKEN not in str(caught.value)


def test_a_container_reads_what_it_has_names_of() -> None:
    names = {"HF_TOKEN": "projects/p/secrets/a/versions/1", "WANDB_API_KEY": "projects/p/secrets/b/versions/1"}
    environ = {VARIABLE: json.dumps(names), "WANDB_API_KEY": "set already"}
    asked: list[str] = []

    def read(name: str) -> str:
        asked.append(name)
        return TOKEN

    assert fetched(environ, read) == {"HF_TOKEN": TOKEN}
    assert asked == [names["HF_TOKEN"]]
    assert fetched({}) == {}
    with pytest.raises(CloudError, match="must be JSON"):
        fetched({VARIABLE: "{"})
    for other in ("[]", '"HF_TOKEN"', '{"HF_TOKEN": 1}'):
        with pytest.raises(CloudError, match="must be a JSON object"):
            fetched({VARIABLE: other})


def test_secret_manager_is_asked_by_its_own_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole of Google's client; only the call itself is answered here."""
    library = pytest.importorskip("google.cloud.secretmanager", reason="the extra gcp is not installed")
    from google.api_core.exceptions import PermissionDenied
    from google.auth.credentials import AnonymousCredentials

    name = "projects/p/secrets/a/versions/latest"

    class Client(library.SecretManagerServiceClient):
        def __init__(self) -> None:
            super().__init__(credentials=AnonymousCredentials())

        def access_secret_version(self, request: object = None, *, name: str | None = None, **rest: object) -> object:
            library.AccessSecretVersionRequest(name=name)
            if name != "projects/p/secrets/a/versions/latest":
                raise PermissionDenied("no")
            return library.AccessSecretVersionResponse(name=name, payload={"data": f"{TOKEN}\n".encode()})

    monkeypatch.setattr(library, "SecretManagerServiceClient", Client)
    assert fetched({VARIABLE: json.dumps({"HF_TOKEN": name})}) == {"HF_TOKEN": TOKEN}
    with pytest.raises(CloudError, match=r"secretmanager\.secretAccessor"):
        fetched({VARIABLE: json.dumps({"HF_TOKEN": "projects/p/secrets/b/versions/1"})})
