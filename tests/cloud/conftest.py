"""Google's services as a server on this machine."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def google() -> Iterator[Any]:
    """(server, client of jobs, client of logs)."""
    pytest.importorskip("google.cloud.aiplatform_v1", reason="the extra vertex is not installed")
    from tests.cloud.google import serving

    with serving() as parts:
        yield parts
