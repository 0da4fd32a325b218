"""Addresses of remote folders: what one may be, and texts without the secrets that could stand in one. Pure."""

import re

# Blanks are in the names of mounted folders, such as My Drive.
_URL = re.compile(r"[a-z][a-z0-9+.-]+://(?=.)[^\s?#@/]*(/[^\s?#@]*( +[^\s?#@]+)*)?")
# What stands before the host of an address, and what follows a question mark, can be a secret.
_CREDENTIALS, _QUERY = re.compile(r"://[^\s'\"]*@"), re.compile(r"(://[^\s'\"?]*)\?[^\s'\"]*")


def check_url(url: str) -> None:
    """See that an address can be written down, and names one folder.

    Raises:
        ValueError: It has credentials, a query or no scheme; the message follows the setting's name.
    """
    if "@" in url or "?" in url:
        raise ValueError(
            "must have no credentials, which come from the environment only (docs/remote.md), and no query; settings "
            "are written to the run folder and shown"
        )
    if not _URL.fullmatch(url) or "::" in url or ".." in url.split("/"):
        raise ValueError("must be the address of a folder, such as gs://bucket/runs, s3://bucket/runs or file:///runs")


def without_secrets(text: str) -> str:
    """A text whose addresses have neither credentials nor queries."""
    return _QUERY.sub(r"\1?...", _CREDENTIALS.sub("://...@", text))
