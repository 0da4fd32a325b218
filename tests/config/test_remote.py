"""remote_dir: an address without secrets, which no error repeats."""

import pytest

from dylora_moe.config import make_config
from dylora_moe.errors import ConfigError


@pytest.mark.parametrize("url", ["gs://bucket/runs", "s3://bucket", "file:///mnt/runs", "memory://x", "abfs://c/runs/"])
def test_addresses_are_taken(url: str) -> None:
    assert make_config({"remote_dir": url}).remote_dir == url


@pytest.mark.parametrize("url", ["s3://KEY:SEC/RET@bucket/runs", "https://host/runs?sig=SECRET", "s3://:SECRET@b"])
def test_secrets_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="remote_dir must have no credentials") as caught:
        make_config({"remote_dir": url})
    assert "SEC" not in str(caught.value) and "RET" not in str(caught.value)


@pytest.mark.parametrize("url", ["runs", "/mnt/runs", "s3:bucket", "a::s3://b", "s3://b/../c", "s3://b c"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="remote_dir must be the address of a folder, such as gs://bucket/runs"):
        make_config({"remote_dir": url})
