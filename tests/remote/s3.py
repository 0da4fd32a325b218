"""A server that speaks S3, moto's, in this process, with a bucket; processes that tests start find it, too."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

_VARIABLES = {
    "AWS_ACCESS_KEY_ID": "key-of-the-test",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of a folder in its bucket."""
    for package in ("s3fs", "moto", "boto3"):
        if find_spec(package) is None:
            pytest.skip(f"S3 is tried with {package}, which is not installed")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = {name: os.environ.get(name) for name in (*_VARIABLES, "AWS_ENDPOINT_URL")}
    os.environ |= _VARIABLES | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket/runs"
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    server.stop()
