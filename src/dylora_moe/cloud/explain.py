"""Errors of Google's clients in words that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from dylora_moe.errors import CloudError

_INSTALL = "Run `pip install 'dylora-moe[vertex]'`."


@contextmanager
def explained() -> Iterator[None]:
    """Inside the block errors of Google's clients become ours, with what to do about them."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CloudError(f"dylora submit vertex needs {error.name}, and it is not installed. {_INSTALL}") from error
    except Exception as error:
        if (cause := _cause(error)) is None:
            raise
        raise CloudError(cause) from error


def _cause(error: Exception) -> str | None:
    """What an error of Google's clients means; None for any other."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    if isinstance(error, GoogleAuthError):
        return (
            f"Google Cloud must know who asks, and does not ({type(error).__name__}). Run `gcloud auth "
            "application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a file of credentials."
        )
    if isinstance(error, exceptions.RetryError):
        return f"Google Cloud must be reachable, and is not: {error}. The same command tries again."
    if not isinstance(error, exceptions.GoogleAPICallError):
        return None
    if isinstance(error, exceptions.PermissionDenied):
        return f"Vertex AI must allow this, and does not: {error.message}. It needs the role roles/aiplatform.user."
    return f"Vertex AI must take this, and answered {type(error).__name__}: {error.message}."
