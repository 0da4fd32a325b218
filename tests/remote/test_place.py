"""Addresses: what is refused, what is retried, and that no secret is ever told."""

import threading
from pathlib import Path

import pytest
from tests.remote.faults import Failing

from dylora_moe.errors import ConfigError, RunError
from dylora_moe.remote import place
from dylora_moe.remote.place import Place, describe, patiently


def test_small_files_and_large_ones(address: str, tmp_path: Path) -> None:
    there = Place(address)
    assert there.list("a") == {}
    with pytest.raises(FileNotFoundError):
        there.read("a/b")
    there.write("a/b", b"text")
    there.write("a/b", b"other text")
    (tmp_path / "large").write_bytes(bytes(range(256)) * 40_000)
    there.send(tmp_path / "large", "a/large")
    assert there.list("a") == {"b": 10, "large": 10_240_000} and there.read("a/b") == b"other text"
    there.fetch("a/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "large").read_bytes()
    with pytest.raises(FileNotFoundError):
        there.fetch("a/none", tmp_path / "none")
    there.delete("a/b")
    there.delete("a/b")
    assert there.list("a") == {"large": 10_240_000}


def test_a_small_file_is_never_read_half_written(address: str) -> None:
    """As the lease is, again and again, by who waits for it."""
    there, contents, over = Place(address), (b"a" * 300_000, b"b" * 200_000), threading.Event()
    there.write("file", contents[0])

    def rewrite() -> None:
        while not over.is_set():
            for content in contents:
                there.write("file", content)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        read = [there.read("file") for _ in range(200)]
    finally:
        over.set()
        thread.join()
    assert set(read) <= set(contents)
    assert set(there.list("")) == {"file"}


def test_folders_have_names_as_people_write_them(tmp_path: Path) -> None:
    for name in ("My Drive", "größe", "a  b"):
        Place(f"file://{tmp_path / name / 'runs'}").write("a/b", b"text")
        assert (tmp_path / name / "runs" / "a" / "b").read_bytes() == b"text"


def test_what_arrives_cut_off_is_noticed(failing: type[Failing], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345678")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="has 4 bytes there instead of 8"):
        patch.setattr(Failing, "put_file", lambda self, a, b, **more: self._write(b, Path(a).read_bytes()[:4]))
        Place(f"failing://{tmp_path / 'remote'}").send(tmp_path / "file", "file")


@pytest.mark.parametrize(
    "url", ["s3://KEY:SECRET@bucket/runs", "s3://KEY:SEC/RET@bucket/runs", "https://host/runs?X-Signature=SECRET"]
)
def test_credentials_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="credentials, which come from the environment") as caught:
        Place(url)
    assert "SEC" not in str(caught.value) and "RET" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["runs", "/runs", "simplecache::s3://bucket", "s3://bucket/../other", "s3://", "s3:// a", "s3://a\n", ""]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="must be the address of a folder"):
        Place(url)


def test_an_unknown_scheme_and_a_missing_client_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="scheme that fsspec knows"):
        Place("nosuch://bucket/runs")

    def missing(*args: object, **kwargs: object) -> None:
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(place.fsspec, "url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"pip install 'dylora-moe\[gcp\]'"):
        Place("gs://bucket/runs")


def test_the_network_is_waited_for() -> None:
    calls, pauses, told = list[int](), list[float](), list[str]()

    def act() -> str:
        calls.append(1)
        if len(calls) < 4:
            raise TimeoutError("https://host/x?signature=SECRET timed out")
        return "done"

    assert patiently(act, "s3://bucket", told.append, pause=pauses.append) == "done"
    assert pauses == [1, 2, 4] and len(told) == 1 and "SECRET" not in told[0]


@pytest.mark.parametrize(("error", "times"), [(TimeoutError(), 7), (PermissionError("no"), 1), (RunError("no"), 1)])
def test_what_no_waiting_mends_ends_at_once(error: Exception, times: int) -> None:
    calls = list[int]()

    def act() -> None:
        calls.append(1)
        raise error

    with pytest.raises(RunError):
        patiently(act, "s3://bucket", lambda text: None, pause=lambda seconds: None)
    assert len(calls) == times


def test_errors_are_told_without_secrets() -> None:
    assert describe(ValueError("at s3://a:b@c/d and https://h/p?k=v\nnext")) == (
        "ValueError: at s3://...@c/d and https://h/p?... next"
    )
