"""What vLLM's HTTP server refuses because it would drop it."""

import json
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from vllm.exceptions import VLLMValidationError

from steer_server.vllm_plugin import endpoints

NESTED = b'{"vllm_xargs": ' + b"[" * 100_000
EDITS = {"vllm_xargs": {"steer": "{}"}}


class Converted:
    def __init__(self, vllm_xargs: dict[str, str] | None) -> None:
        self.vllm_xargs = vllm_xargs

    def to_beam_search_params(self) -> str:
        return "parameters"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """Of an app made as vLLM makes it, which says of each POST what it got."""
    module: Any = ModuleType(endpoints._APP)
    module.init_entrypoints_middleware = lambda args, app, tasks: args.added.append(tasks)
    monkeypatch.setitem(endpoints.sys.modules, endpoints._APP, module)
    for name in endpoints._BEAM_SEARCHES:
        monkeypatch.setitem(endpoints._BEAM_SEARCHES, name, "Request")
        monkeypatch.setitem(endpoints.sys.modules, name, SimpleNamespace(Request=Converted))
    endpoints.guard()
    wrapped = module.init_entrypoints_middleware, Converted.to_beam_search_params
    endpoints.guard()
    assert wrapped == (module.init_entrypoints_middleware, Converted.to_beam_search_params)
    app, args = FastAPI(), SimpleNamespace(added=[])
    module.init_entrypoints_middleware(args, app, ("generate",))
    assert args.added == [("generate",)]

    @app.post("/{path:path}")
    async def echo(request: Request) -> str:
        return (await request.body()).decode(errors="replace")

    return TestClient(app)


@pytest.mark.parametrize(
    "path",
    [
        "/generative_scoring",
        "/pooling",
        "/v1/systemone",
        "/inference/v1/generate",
        "/new",
        "/cohere/v2/chat/render",
    ],
)
def test_edits_are_refused_where_nobody_would_make_them(client: TestClient, path: str) -> None:
    answer = client.post(path, content=json.dumps(EDITS))

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "steer"
    assert path in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions",
        "/v1/completions/",
        "/behind/a/proxy/v1/chat/completions",
        "/v1/responses/render",
        "/tokenize",
    ],
)
def test_edits_pass_where_the_engine_sees_them_or_nothing_is_generated(
    client: TestClient, path: str
) -> None:
    assert client.post(path, content=json.dumps(EDITS)).json() == json.dumps(EDITS)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"vllm_xargs": 1}',
        b'{"vllm_xargs": {"a": 1}}',
        b"\xffvllm_xargs",
        NESTED,
    ],
)
def test_what_has_no_edits_passes_as_it_came(client: TestClient, body: bytes) -> None:
    def chunks():
        yield from (body[:3], body[3:])

    for content in (body, chunks()):
        answer = client.post("/generative_scoring", content=content)
        assert answer.status_code == 200
        assert answer.json() == body.decode(errors="replace")


def test_other_requests_pass(client: TestClient) -> None:
    assert client.get("/health").status_code == 405


@pytest.mark.usefixtures("client")
def test_beam_search_drops_no_edits() -> None:
    assert [Converted(xargs).to_beam_search_params() for xargs in (None, {"a": "1"})] == [
        "parameters",
        "parameters",
    ]
    with pytest.raises(VLLMValidationError, match="beam search"):
        Converted({"steer": "{}"}).to_beam_search_params()
