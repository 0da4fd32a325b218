"""Each family of the `flask` skill, run: the app is built for real and asked through Flask's test client."""

import csv
import io
import json
import random
import sqlite3
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dylora_moe.data.synthetic import families

flask = pytest.importorskip("flask")


class Task(NamedTuple):
    code: dict[str, Any]
    words: Mapping[str, str]

    def text(self, template: str) -> str:
        return template.format(**self.words)

    def named(self, template: str) -> Any:
        return self.code[self.text(template)]

    @property
    def app(self) -> Any:
        return self.code["app"]

    @property
    def client(self) -> Any:
        return self.app.test_client()

    @property
    def path(self) -> str:
        return self.text("/{noun}s")


@pytest.fixture(params=range(3))
def task(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Task:
    """A drawn answer of the family that the test is named after, executed."""
    monkeypatch.setenv("SECRET_KEY", "for tests")
    name = request.function.__name__.removeprefix("test_")
    family = next(family for family in families("flask") if family.name == name)
    draft = family.build(random.Random(request.param))
    code: dict[str, Any] = {"__name__": "drawn"}
    exec(compile(draft.answer, name, "exec"), code)
    return Task(code=code, words=draft.parameters)


def test_every_family_is_run():
    assert {f"test_{family.name}" for family in families("flask")} <= set(globals())


def test_json_route(task: Task):
    response = task.client.get(task.text("/{path}"))

    assert response.json == {task.words["key"]: task.words["value"]}
    assert task.client.post(task.text("/{path}")).status_code == 405


def test_path_parameter(task: Task):
    known, unknown = {
        "int": (3, 4),
        "string": ("three", "four"),
        "uuid": (uuid.UUID(int=3), uuid.UUID(int=4)),
    }[task.words["converter"]]
    task.named("{noun}s")[known] = {"name": "third"}

    assert task.client.get(f"{task.path}/{known}").json == {"name": "third"}
    assert task.client.get(f"{task.path}/{unknown}").status_code == 404
    assert task.text("{verb}_{noun}") in task.app.view_functions


def test_create_from_json(task: Task):
    field = task.words["field"]
    good = task.client.post(task.path, json={field: "x", "more": 1})
    refused = [
        task.client.post(task.path, json={"more": 1}),
        task.client.post(task.path, json=["x"]),
        task.client.post(task.path, data="not json"),
    ]

    assert (good.status_code, good.json) == (201, {field: "x", "more": 1})
    assert {response.status_code for response in refused} == {int(task.words["code"])}
    assert refused[0].json == {"error": f"{field} is required"}
    assert task.named("{noun}s") == [{field: "x", "more": 1}]


def test_query_page(task: Task):
    task.named("{noun}s").extend(range(120))
    size, name = int(task.words["size"]), task.words["name"]

    assert task.client.get(task.path).json == list(range(size))
    assert task.client.get(f"{task.path}?page=2").json == list(range(size, 2 * size))
    assert task.client.get(f"{task.path}?page=3&{name}=7").json == list(range(14, 21))
    assert task.client.get(f"{task.path}?page=x").json == list(range(size))


def test_query_filter(task: Task):
    field = task.words["field"]
    rows = [{field: "a", "id": 1}, {field: "b", "id": 2}, {"id": 3}]
    task.named("{noun}s").extend(rows)

    assert task.client.get(task.path, query_string={field: "b"}).json == [rows[1]]
    assert task.client.get(task.path).json == rows


def test_delete_one(task: Task):
    task.named("{noun}s").update({1: "first", 2: "second"})

    assert task.client.delete(f"{task.path}/1").status_code == 204
    assert task.client.delete(f"{task.path}/1").status_code == int(task.words["code"])
    assert task.named("{noun}s") == {2: "second"}


def test_file_upload(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / task.words["folder"]).mkdir()
    field, path = task.words["field"], task.text("/{path}")

    sent = task.client.post(path, data={field: (io.BytesIO(b"content"), "../../my file.txt")})
    refused = [
        task.client.post(path),
        task.client.post(path, data={field: (io.BytesIO(b"content"), "..")}),
    ]

    assert (sent.status_code, sent.json) == (201, {"name": "my_file.txt"})
    assert (tmp_path / task.words["folder"] / "my_file.txt").read_bytes() == b"content"
    assert [response.status_code for response in refused] == [400, 400]
    assert refused[0].json == {"error": f"{field} is required"}


def test_redirect(task: Task):
    response = task.client.get(task.text("/{old}/{noun}s"))

    assert response.status_code == int(task.words["code"])
    assert response.location == task.path
    assert task.client.get(response.location).json == []


def test_stream_lines(task: Task):
    first, second = task.words["first"], task.words["second"]
    task.named("{noun}s").extend([{first: 1, second: "a\nb", "more": 0}, {first: 2, second: "c"}])

    response = task.client.get(f"{task.path}.jsonl")

    assert response.is_streamed and response.mimetype == "application/x-ndjson"
    rows = [json.loads(line) for line in response.text.splitlines()]
    assert rows == [{first: 1, second: "a\nb"}, {first: 2, second: "c"}]


def test_csv_export(task: Task):
    first, second = task.words["first"], task.words["second"]
    task.named("{noun}s").extend([{first: "1", second: 'a,"b"', "more": 0}, {first: "2", second: "c"}])

    response = task.client.get(f"{task.path}.csv")

    assert response.mimetype == "text/csv"
    rows = list(csv.reader(io.StringIO(response.text)))
    assert rows == [[first, second], ["1", 'a,"b"'], ["2", "c"]]


def test_template_string(task: Task):
    page = task.client.get(f"{task.path}/<b>").text

    assert page == task.text("<{tag}>{word} &lt;b&gt;</{tag}>")


def test_set_cookie(task: Task):
    client = task.client
    response = client.post(task.text("/{name}/dark"))
    cookie = client.get_cookie(task.words["name"])

    assert response.status_code == 204
    assert (cookie.value, cookie.http_only) == ("dark", True)
    assert cookie.max_age == int(task.words["days"]) * 86400


def test_read_header(task: Task):
    path, header = task.text("/{path}"), task.words["header"]

    assert task.client.get(path, headers={header: "mine"}).json == {"value": "mine"}
    # The client always sends a User-Agent of its own.
    if header != "User-Agent":
        assert task.client.get(path).json == {"value": task.words["missing"]}


def test_error_handler(task: Task):
    code = int(task.words["code"])
    task.app.add_url_rule("/fails", view_func=lambda: flask.abort(code))

    response = task.client.get("/fails")

    assert (response.status_code, response.json) == (code, {task.words["key"]: task.words["text"]})
    assert task.named("{name}")


def test_own_exception(task: Task):
    response = task.client.get(f"{task.path}/blue")

    assert response.status_code == int(task.words["code"])
    assert response.json == {"error": task.text("{noun} blue")}
    assert issubclass(task.named("{ending}"), Exception)


def test_blueprint(task: Task):
    response = task.client.get(task.text("/{prefix}/{noun}s/"))

    assert (response.status_code, response.json) == (200, [])
    assert task.app.blueprints == {task.text("{noun}s"): task.code["bp"]}


def test_check_key_before(task: Task):
    task.app.config[task.words["setting"]] = "right"
    header, refused = task.words["header"], int(task.words["code"])

    assert task.client.get(task.path, headers={header: "right"}).json == []
    for headers in ({header: "wrong"}, {header: "r\u00efght"}, {}):
        assert task.client.get(task.path, headers=headers).status_code == refused


def test_login_required(task: Task):
    task.app.secret_key = "for tests"
    client, path = task.client, task.text("/my/{noun}s")

    assert client.get(path).status_code == 401
    with client.session_transaction() as session:
        session[task.words["key"]] = "ann"
    assert client.get(path).json == []
    assert task.text("my_{noun}s") in task.app.view_functions
    assert callable(task.named("{decorator}"))


def test_session_login(task: Task):
    client, key = task.client, task.words["key"]

    def remembered() -> Any:
        with client.session_transaction() as session:
            return session.get(key)

    assert client.post(task.text("/{enter}"), data={key: "ann"}).status_code == 204
    assert remembered() == "ann"
    assert client.post(task.text("/{leave}")).status_code == 204
    assert remembered() is None
    assert client.post(task.text("/{enter}")).status_code == 400
    assert task.app.secret_key == "for tests"


def test_app_factory(task: Task):
    create, path = task.named("{name}"), task.text("/{path}")
    standard, changed = create(), create({task.words["setting"]: "mine"})

    assert standard.test_client().get(path).json == {"value": task.words["default"]}
    assert changed.test_client().get(path).json == {"value": "mine"}


def test_database_teardown(task: Task, tmp_path: Path):
    file = tmp_path / "test.db"
    with sqlite3.connect(file) as database:
        database.execute(task.text("CREATE TABLE {noun}s (name TEXT)"))
        database.executemany(task.text("INSERT INTO {noun}s VALUES (?)"), [("a",), ("b",)])
    database.close()
    task.app.config[task.words["setting"]] = file

    assert task.client.get(f"{task.path}/count").json == {"count": 2}
    with task.app.app_context():
        connection = task.named("{verb}")()
        assert task.named("{verb}")() is connection
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")


def test_response_header(task: Task):
    response = task.client.get("/nowhere")

    assert response.status_code == 404
    assert response.headers[task.words["header"]] == task.words["value"]
    assert callable(task.named("{name}"))


def test_method_view(task: Task):
    added = task.client.post(task.path, json={"id": 1})

    assert (added.status_code, added.json) == (201, {"id": 1})
    assert task.client.get(task.path).json == [{"id": 1}]
    assert issubclass(task.named("Item{suffix}"), flask.views.MethodView)


def test_test_client(task: Task):
    app = flask.Flask("served")
    code = int(task.words["code"])
    app.add_url_rule(f"{task.path}/<int:number>", view_func=lambda number: ({"id": number}, number))
    function = task.named("{verb}_{noun}")

    assert function(app, code) == {"id": code}
    assert function(app, 500) is None


def test_request_time(task: Task, monkeypatch: pytest.MonkeyPatch):
    now = iter([10.0, 10.123456789])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))

    response = task.client.get("/nowhere")

    digits = int(task.words["digits"])
    assert response.headers[task.words["header"]] == f"{0.123456789:.{digits}f}"
    assert callable(task.named("{start}")) and callable(task.named("{stop}"))
