"""Each family of the `requests` skill, run: the real library sends, `responses` stands for the server."""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dylora_moe.data.synthetic import families

requests = pytest.importorskip("requests")
responses = pytest.importorskip("responses")
matchers = responses.matchers


class Task(NamedTuple):
    code: dict[str, Any]
    words: Mapping[str, str]

    def function(self, template: str) -> Callable[..., Any]:
        return self.code[template.format(**self.words)]

    @property
    def url(self) -> str:
        return "{host}/{noun}s".format(**self.words)


@pytest.fixture(params=range(3))
def task(request: pytest.FixtureRequest) -> Task:
    """A drawn answer of the family that the test is named after, executed."""
    name = request.function.__name__.removeprefix("test_")
    family = next(family for family in families("requests") if family.name == name)
    draft = family.build(random.Random(request.param))
    code: dict[str, Any] = {}
    exec(compile(draft.answer, name, "exec"), code)
    return Task(code=code, words=draft.parameters)


@pytest.fixture
def web(request: pytest.FixtureRequest, task: Task) -> Iterator[Any]:
    """A server that must get every request it was told of, each with the time limit of its family."""
    usual = 60 if request.function is test_upload_file else 10
    with responses.RequestsMock() as mock:
        yield mock
        limits = {call.request.req_kwargs["timeout"] for call in mock.calls}
    assert limits == {int(task.words.get("timeout", usual))}


def test_every_family_is_run():
    assert {f"test_{family.name}" for family in families("requests")} <= set(globals())


def test_get_params(task: Task, web: Any):
    field = task.words["field"]
    web.get(task.url, json=[{"id": 1}], match=[matchers.query_param_matcher({field: "a&b c"})])
    web.get(task.url, status=500)
    function = task.function("{verb}_{noun}s")

    assert function("a&b c") == [{"id": 1}]
    with pytest.raises(requests.HTTPError):
        function("x")


def test_post_json(task: Task, web: Any):
    body = {task.words["first"]: "one", task.words["second"]: 2}
    web.post(task.url, json={"id": 41}, status=201, match=[matchers.json_params_matcher(body)])
    web.post(task.url, status=422)
    function = task.function("create_{noun}")

    assert function("one", 2) == 41
    with pytest.raises(requests.HTTPError):
        function("one", 2)


def test_bearer_token(task: Task, web: Any):
    headers = matchers.header_matcher({"Authorization": "Bearer secret"})
    web.get(f"{task.url}/7", json={"id": 7}, match=[headers])
    web.get(f"{task.url}/7", status=401)
    function = task.function("{verb}_{noun}")

    assert function(7, "secret") == {"id": 7}
    with pytest.raises(requests.HTTPError):
        function(7, "wrong")


def test_api_key_from_environment(task: Task, web: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(task.words["variable"], "secret")
    web.get(task.url, json=[1], match=[matchers.header_matcher({task.words["header"]: "secret"})])
    web.get(task.url, status=401, json=[])
    function = task.function("{verb}_{noun}s")

    assert function() == [1]
    with pytest.raises(requests.HTTPError):
        function()
    monkeypatch.delenv(task.words["variable"])
    with pytest.raises(KeyError):
        function()


def test_basic_auth(task: Task, web: Any):
    headers = matchers.header_matcher({"Authorization": "Basic YW5uOnB3"})
    web.get(task.url, json=[1], match=[headers])
    web.get(task.url, status=401)
    function = task.function("{verb}_{noun}s")

    assert function("ann", "pw") == [1]
    with pytest.raises(requests.HTTPError):
        function("ann", "other")


def test_send_cookie(task: Task, web: Any):
    headers = matchers.header_matcher({"Cookie": "{cookie}=abc".format(**task.words)})
    web.get(task.url, json=[1], match=[headers])
    web.get(task.url, status=403)
    function = task.function("{verb}_{noun}s")

    assert function("abc") == [1]
    with pytest.raises(requests.HTTPError):
        function("abc")


def test_none_when_missing(task: Task, web: Any):
    web.get(f"{task.url}/7", json={"id": 7})
    web.get(f"{task.url}/8", status=404)
    web.get(f"{task.url}/9", status=500)
    function = task.function("{verb}_{noun}")

    assert function(7) == {"id": 7}
    assert function(8) is None
    with pytest.raises(requests.HTTPError):
        function(9)


def test_fallback_on_failure(task: Task, web: Any):
    fallback = {"None": None, "[]": [], "{}": {}}[task.words["fallback"]]
    web.get(task.url, json=["one"])
    web.get(task.url, status=503, json="not this")
    web.get(task.url, body=requests.ConnectTimeout())
    web.get(task.url, body="not json")
    function = task.function("{verb}_{noun}s")

    assert function() == ["one"]
    assert [function() for _ in range(3)] == [fallback] * 3


def test_head_header(task: Task, web: Any):
    header = task.words["header"]
    web.head(f"{task.url}/7", status=301, headers={"Location": f"{task.url}/8"})
    web.head(f"{task.url}/8", headers={header: "12"})
    web.head(f"{task.url}/9", status=404)
    function = task.function("{verb}_{noun}_header")

    assert function(7) == "12"
    with pytest.raises(requests.HTTPError):
        function(9)


def test_paginate_by_number(task: Task, web: Any):
    for page, entries in enumerate([["a", "b"], ["c"], []], start=1):
        params = {"page": str(page), task.words["size_name"]: task.words["size"]}
        web.get(task.url, json=entries, match=[matchers.query_param_matcher(params)])

    function = task.function("fetch_all_{noun}s")

    assert function() == ["a", "b", "c"]
    web.reset()
    web.get(task.url, status=500, json=[])
    with pytest.raises(requests.HTTPError):
        function()


def test_paginate_by_next(task: Task, web: Any):
    items, following = task.words["items"], task.words["next"]
    web.get(task.url, json={items: ["a", "b"], following: f"{task.url}?cursor=2"})
    web.get(f"{task.url}?cursor=2", json={items: ["c"], following: None})

    web.get(task.url, status=500, json={items: [], following: None})
    function = task.function("iter_{noun}s")

    assert list(function()) == ["a", "b", "c"]
    with pytest.raises(requests.HTTPError):
        list(function())


def test_change_one(task: Task, web: Any):
    body = matchers.json_params_matcher({task.words["field"]: "new"})
    web.add(task.words["method"].upper(), f"{task.url}/7", json={"id": 7}, match=[body])
    web.add(task.words["method"].upper(), f"{task.url}/8", status=404)
    function = task.function("{verb}_{noun}")

    assert function(7, "new") == {"id": 7}
    with pytest.raises(requests.HTTPError):
        function(8, "new")


def test_delete_one(task: Task, web: Any):
    web.delete(f"{task.url}/7", status=int(task.words["code"]))
    web.delete(f"{task.url}/8", status=404)
    function = task.function("{verb}_{noun}")

    assert function(7) is True
    assert function(8) is False


def test_upload_file(task: Task, web: Any, tmp_path: Path):
    path = tmp_path / "thing.bin"
    path.write_bytes(b"content")
    url = "{host}/uploads".format(**task.words)
    parts = matchers.multipart_matcher({task.words["field"]: ("thing.bin", b"content")})
    web.post(url, json={"url": "https://example.com/1"}, match=[parts])
    web.post(url, status=413)
    function = task.function("upload_{thing}")

    assert function(path) == "https://example.com/1"
    with pytest.raises(requests.HTTPError):
        function(path)


def test_download_stream(task: Task, web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = random.Random(0).randbytes(100_000)
    sizes: list[int] = []
    iter_content = requests.Response.iter_content

    def spy(response: Any, chunk_size: int) -> Any:
        sizes.append(chunk_size)
        return iter_content(response, chunk_size)

    monkeypatch.setattr(requests.Response, "iter_content", spy)
    web.get("https://example.com/thing", body=content)
    web.get("https://example.com/gone", status=404)
    function = task.function("{verb}_{thing}")

    function("https://example.com/thing", tmp_path / "thing")
    with pytest.raises(requests.HTTPError):
        function("https://example.com/gone", tmp_path / "gone")

    assert (tmp_path / "thing").read_bytes() == content
    assert not (tmp_path / "gone").exists()
    assert web.calls[0].request.req_kwargs["stream"] is True
    assert sizes == [int(task.words["chunk"])]


def test_session_login(task: Task, web: Any):
    login = "{host}/{path}".format(**task.words)
    form = matchers.urlencoded_params_matcher({task.words["user"]: "ann", "password": "pw"})
    web.post(login, headers={"Set-Cookie": "sid=xyz; Path=/"}, match=[form])
    web.get(task.url, json=[1], match=[matchers.header_matcher({"Cookie": "sid=xyz"})])
    web.get(task.url, status=403, json=[])
    function = task.function("fetch_{noun}s")

    assert function("ann", "pw") == [1]
    with pytest.raises(requests.HTTPError):
        function("ann", "pw")
    web.post(login, status=401)
    with pytest.raises(requests.HTTPError):
        function("ann", "wrong")
    assert len(web.calls) == 5


def test_session_with_retries(task: Task):
    session = task.function("{function}")()
    total = int(task.words["total"])
    for code in json.loads("[{codes}]".format(**task.words)):
        with responses.RequestsMock() as web:
            for _ in range(total):
                web.get("https://api.example.com/", status=code)
            web.get("https://api.example.com/", json="ok")

            assert session.get("https://api.example.com/", timeout=1).json() == "ok"
            assert len(web.calls) == total + 1
        with responses.RequestsMock() as web:
            for _ in range(total + 1):
                web.get("https://api.example.com/", status=code)
            with pytest.raises(requests.exceptions.RetryError):
                session.get("https://api.example.com/", timeout=1)
            assert len(web.calls) == total + 1
    with responses.RequestsMock() as web:
        web.get("https://api.example.com/", status=404)
        assert session.get("https://api.example.com/", timeout=1).status_code == 404

    # responses retries without pausing, so the pause is read from the policy.
    policy = session.get_adapter("https://api.example.com/").max_retries
    assert policy.backoff_factor == float(task.words["backoff"])


def test_wait_when_limited(task: Task, web: Any, monkeypatch: pytest.MonkeyPatch):
    waits: list[int] = []
    monkeypatch.setattr("time.sleep", waits.append)
    web.get(task.url, status=429, headers={"Retry-After": "11"})
    web.get(task.url, status=429)
    web.get(task.url, json=[1])
    function = task.function("{verb}_{noun}s")

    assert function() == [1]
    assert waits == [11, int(task.words["delay"])]

    web.reset()
    web.get(task.url, status=429)
    with pytest.raises(RuntimeError, match=r"too many requests$"):
        function()
    assert len(web.calls) == int(task.words["attempts"])

    web.reset()
    web.get(task.url, status=500)
    with pytest.raises(requests.HTTPError):
        function()
