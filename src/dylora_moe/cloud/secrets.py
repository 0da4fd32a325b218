"""Secrets of a run by name: a job's text has the names, its container fetches what they stand for.

Vertex AI gives a container nothing but plain variables, which everyone reads who may see the job.
"""

import json
import os
import re
from collections.abc import Callable, Mapping

from dylora_moe.errors import CloudError
from dylora_moe.report.settings import without_secrets

VARIABLE = "DYLORA_SECRETS"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"[A-Za-z0-9_-]{1,255}")
_KEEPS_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")
# Of a value of the environment that is looked for within a text: no word, no path.
_LONG = re.compile(r"[^\s/]{12,}")
_RESOURCE = re.compile(r"projects/[^/]+/secrets/[A-Za-z0-9_-]{1,255}/versions/[A-Za-z0-9_-]+")


def resource_of(given: str, project: str, environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """`HF_TOKEN=hf-token` -> the variable, and the full name of the secret's newest version.

    Args:
        given: A variable and the name of a secret in Secret Manager, short or full.
        project: Whose secret a short name means.
        environ: Where a secret itself, given by mistake, is known from.

    Raises:
        CloudError: It has another form, or seems to be the secret itself; the message does not repeat it then.
    """
    variable, sign, secret = given.partition("=")
    known = {value for name, value in environ.items() if name == variable or _KEEPS_SECRET.search(name)}
    if any(part and (without_secrets(part) != part or part in known) for part in (variable, secret)):
        raise CloudError(
            "--secret must be VARIABLE=NAME, with the name of a secret in Secret Manager, got what seems to be the "
            "secret itself. Store it with `gcloud secrets create NAME --data-file=-`, and give that NAME."
        )
    if not sign or not _NAME.fullmatch(variable) or not (_SECRET.fullmatch(secret) or _RESOURCE.fullmatch(secret)):
        raise CloudError(
            "--secret must be VARIABLE=NAME, such as HF_TOKEN=hf-token, with the name of a secret in Secret Manager, "
            f"got {f'{variable}=...' if sign else 'a text without ='}."
        )
    full = secret if "/" in secret else f"projects/{project}/secrets/{secret}/versions/latest"
    return variable, full


def check_no_secrets(text: str, what: str, environ: Mapping[str, str] = os.environ) -> None:
    """See that a text which others can read holds no secret.

    Args:
        text: To be read by others.
        what: Its name in the message.
        environ: Whose secrets are looked for, too.

    Raises:
        CloudError: Something in it looks like one, or is one of the environment.
    """
    known = (value for name, value in environ.items() if _KEEPS_SECRET.search(name) and _LONG.fullmatch(value))
    if without_secrets(text) != text or any(value in text for value in known):
        raise CloudError(
            f"{what} must hold no password and no key, since all who may see the job can read it, and something in it "
            "looks like one. Leave it out, and give it by name: --secret VARIABLE=NAME."
        )


def fetched(environ: Mapping[str, str], read: Callable[[str], str] | None = None) -> dict[str, str]:
    """Variable -> secret, for the names in the environment; variables that are set already are left alone.

    Args:
        environ: Of the container.
        read: Full name of a version -> its content; by default from Secret Manager, as the job's service account.

    Raises:
        CloudError: The names cannot be parsed, or a secret cannot be read.
    """
    try:
        names = json.loads(environ.get(VARIABLE, "{}"))
    except ValueError as error:
        raise CloudError(f"{VARIABLE} must be JSON, variables and names of secrets, got no JSON: {error}.") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CloudError(f"{VARIABLE} must be a JSON object, variables and names of secrets, got other JSON.")
    wanted = {variable: name for variable, name in names.items() if variable not in environ}
    if not wanted:
        return {}
    read = read or _from_secret_manager()
    return {variable: read(name) for variable, name in wanted.items()}


def _from_secret_manager() -> Callable[[str], str]:
    try:
        from google.api_core.exceptions import GoogleAPICallError
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.secretmanager import SecretManagerServiceClient
    except ModuleNotFoundError as error:
        raise CloudError(
            f"secrets in {VARIABLE} need {error.name}, and it is not installed. Run `pip install 'dylora-moe[gcp]'`."
        ) from error

    try:
        client = SecretManagerServiceClient()
    except GoogleAuthError as error:
        raise CloudError(
            f"Google Cloud must know who asks for secrets, and does not ({type(error).__name__}). Outside of it set "
            "the variables themselves, and leave their names out."
        ) from error

    def read(name: str) -> str:
        try:
            return client.access_secret_version(name=name).payload.data.decode().rstrip("\n")
        except (GoogleAPICallError, GoogleAuthError) as error:
            raise CloudError(
                f"the secret {name} must be readable by the job's service account, got {type(error).__name__}. Give "
                "that account the role roles/secretmanager.secretAccessor."
            ) from error

    return read
