"""The server's paths: OpenAI's, health, metrics, and the page."""

import base64
import hashlib
import time
from collections.abc import Mapping
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dylora_moe.evaluate.load import Speaker
from dylora_moe.serve.guard import Guard
from dylora_moe.serve.local import Backend
from dylora_moe.serve.metrics import Metrics
from dylora_moe.serve.schema import FAILED, ApiError, Body, ChatRequest, CompletionRequest, closing, explain


def page_policy(page: str) -> str:
    """What a browser may do on the page: run the script that it has, and no other, and ask this server."""
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Answers:
    """What is shared by all requests.

    Args:
        backend: Who answers.
        names: Name -> who answers.
        metrics: What is counted.
    """

    def __init__(self, backend: Backend, names: Mapping[str, Speaker], metrics: Metrics) -> None:
        self.backend, self.names, self.metrics = backend, names, metrics
        self.created = int(time.time())
        self.is_closing, self.under_way = False, 0

    async def answer(self, body: Body, http: Request) -> Response:
        """The answer to one request."""
        if self.is_closing:
            raise closing()
        speaker = self.names.get(body.model)
        if speaker is None:
            raise ApiError(
                404,
                f"there is no model {body.model[:100]!r}; there are {', '.join(self.names)}.",
                code="model_not_found",
                param="model",
            )
        return await self.backend.answer(body, speaker, http)

    def model(self, name: str) -> dict[str, Any]:
        """One model as OpenAI describes it, and who of the run it is."""
        kind = {"routed": "mixture"}.get(self.names[name].kind, self.names[name].kind)
        return {"id": name, "object": "model", "created": self.created, "owned_by": "dylora-moe", "kind": kind}


def make_app(answers: Answers, *, key: str | None, only_local: bool, most_bytes: int = 1_000_000) -> Guard:
    """The app behind its guard.

    Args:
        answers: What answers.
        key: Bearer token that requests must bring; None for none.
        only_local: Answer only those who asked for this machine by a local name.
        most_bytes: Of a body.
    """
    text = (resources.files("dylora_moe.serve") / "page.html").read_text(encoding="utf-8")
    app = FastAPI(title="DyLoRA-MoE", docs_url=None, redoc_url=None)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: Request) -> Response:
        http.state.model = body.model
        return await answers.answer(body, http)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, http: Request) -> Response:
        http.state.model = body.model
        return await answers.answer(body, http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [answers.model(name) for name in answers.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name not in answers.names:
            raise ApiError(404, f"there is no model {name[:100]!r}.", code="model_not_found", param="model")
        return answers.model(name)

    @app.get("/health")
    async def health() -> Response:
        if not answers.backend.is_alive():
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        if answers.is_closing or not answers.backend.is_alive():
            return JSONResponse({"status": "closing" if answers.is_closing else "failed"}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(answers.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(text, headers={"Content-Security-Policy": page_policy(text)})

    @app.exception_handler(ApiError)
    async def refused(http: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def wrong(http: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return explain(list(error.errors())).response()

    @app.exception_handler(HTTPException)
    async def missing(http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = ApiError(error.status_code, f"{http.method} {http.url.path[:100]}: {error.detail}.").response()
        told.headers.update(error.headers or {})  # such as the methods that are allowed
        return told

    @app.exception_handler(Exception)
    async def failed(http: Request, error: Exception) -> Response:  # raised again behind it, and logged by the guard
        return ApiError(500, FAILED, kind="server_error").response()

    app.add_middleware(_Counted, answers=answers)
    return Guard(app, key=key, only_local=only_local, most_bytes=most_bytes)


class _Counted:
    """Counts requests for answers by their end, and those under way."""

    def __init__(self, app: Any, answers: Answers) -> None:
        self._app, self._answers = app, answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        path = scope.get("path", "")
        if scope["type"] != "http" or path not in ("/v1/chat/completions", "/v1/completions"):
            await self._app(scope, receive, send)
            return
        state: dict[str, Any] = scope.setdefault("state", {})
        status = 500

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._answers.under_way += 1
        try:
            await self._app(scope, receive, counted)
        finally:
            self._answers.under_way -= 1
            model = state.get("model", "")
            known = model if model in self._answers.names else "unknown"
            # A stream that failed, or whose client left, began with status 200.
            self._answers.metrics.requests.labels(path, known, str(state.get("status", status))).inc()
