"""The OpenAPI document tells the truth, and its page needs nothing from elsewhere."""

from __future__ import annotations

import asyncio
import re
import threading
from typing import Any

import httpx
import jsonschema
import pytest

from serve_app import errors
from serve_app.config import ApiKeysConfig, IngressSettings
from serve_app.ingress import openapi
from serve_app.ingress.access import Guard
from serve_app.ingress.asgi import App, create_app
from serve_app.ingress.door import Door
from serve_app.ingress.keys import Key, KeyRing, digest_of
from serve_app.ingress.protocols.open_inference import unsupported
from serve_app.ingress.service import SettingsRef
from serve_app.ingress.statuses import STATUSES
from tests.ingress.edge import FakeService, client_of, edge_app

PAGES = {"/docs", "/docs/docs.css", "/docs/docs.js", "/openapi.json"}


def document_of(app: App) -> dict[str, Any]:
    async def fetch() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge") as client:
            return (await client.get("/openapi.json")).json()

    return asyncio.run(fetch())


DOCUMENT = document_of(edge_app(FakeService()))
OPERATIONS = [(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods]
POSTS = [path for method, path in OPERATIONS if method == "post"]


def test_no_two_schemas_have_one_title() -> None:
    """Generators of clients name their classes for titles, and leave out routes of one that they have already."""
    schemas = DOCUMENT["components"]["schemas"]
    titles = [schema["title"] for schema in schemas.values()]
    assert sorted(titles) == sorted(set(titles))
    assert list(schemas) == titles


def schema_of(path: str, method: str, status: int) -> dict[str, Any]:
    """The documented schema of an answer, with what it refers to."""
    contents = DOCUMENT["paths"][path][method]["responses"][str(status)]["content"]
    content = contents.get("application/json") or next(iter(contents.values()))
    return {**content["schema"], "components": DOCUMENT["components"]}


def body_schema_of(path: str) -> dict[str, Any]:
    schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return {**schema, "components": DOCUMENT["components"]}


def example_of(path: str) -> Any:
    """The example of the body; where the model's task decides what the body is, that of the first task."""
    schema = body_schema_of(path)
    name = schema.get("anyOf", [schema])[0]["$ref"].rsplit("/", 1)[1]
    return DOCUMENT["components"]["schemas"][name]["examples"][0]


def concrete(path: str) -> str:
    return path.replace("{name}", "tiny")


def test_every_route_but_the_documentations_own_is_documented() -> None:
    routes = {(route.method.lower(), route.path) for route in edge_app(FakeService()).routes}
    refused = {(route.method.lower(), route.path) for route in unsupported.routes()}
    assert routes - set(OPERATIONS) == {("get", path) for path in PAGES} | {("get", "/")} | refused
    assert set(OPERATIONS) <= routes


def test_every_reference_leads_somewhere_and_every_schema_is_a_schema() -> None:
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', httpx.Response(200, json=DOCUMENT).text))
    assert references == set(DOCUMENT["components"]["schemas"])
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


async def test_keys_are_asked_for_where_the_document_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEYS", Key("alice", digest_of(b"k")).line)
    guard = Guard(KeyRing(ApiKeysConfig(environment="SOME_KEYS")))
    app = create_app(FakeService(), SettingsRef(IngressSettings()), door=Door(guard))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge") as client:
        document = (await client.get("/openapi.json")).json()
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                response = await client.request(method, concrete(path))
                assert (response.status_code == 401) == ("security" in operation), path
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert "An API key is asked for" in document["info"]["description"]
    assert "securitySchemes" not in DOCUMENT["components"]
    assert "No API key is asked for" in DOCUMENT["info"]["description"]


def test_operations_have_names_of_their_own() -> None:
    names = [DOCUMENT["paths"][path][method]["operationId"] for method, path in OPERATIONS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
async def test_answers_are_as_documented(client: httpx.AsyncClient, method: str, path: str) -> None:
    body = example_of(path) if method == "post" else None
    response = await client.request(method, concrete(path), json=body)
    assert response.status_code == 200
    documented = DOCUMENT["paths"][path][method]["responses"]["200"]
    assert response.headers["content-type"].split(";")[0] in documented["content"]
    assert set(documented.get("headers", {})) <= set(response.headers)
    answer = response.json() if "application/json" in documented["content"] else response.text
    jsonschema.validate(answer, schema_of(path, method, 200), jsonschema.Draft202012Validator)


@pytest.mark.parametrize("path", POSTS)
async def test_examples_are_bodies_by_the_documented_schema(path: str) -> None:
    jsonschema.validate(example_of(path), body_schema_of(path), jsonschema.Draft202012Validator)


@pytest.mark.parametrize("field", ["inputs", "input", "dimensions", "truncate", "truncation_direction", "model"])
@pytest.mark.parametrize("value", ["", [], {}, None, 5, -1, 2.5, True, ["", 1], [[]], [[1, "a"]], [1, -1]], ids=repr)
@pytest.mark.parametrize("path", ["/embed", "/similarity", "/v1/embeddings", "/predict", "/embed_all", "/embed_sparse"])
async def test_what_the_schema_refuses_is_refused(client: httpx.AsyncClient, path: str, field: str, value: Any) -> None:
    body = {**example_of(path), field: value}
    response = await client.post(path, json=body)
    if not jsonschema.Draft202012Validator(body_schema_of(path)).is_valid(body):
        assert 400 <= response.status_code < 500
    else:
        # What a schema cannot say: which models there are, and how many numbers their vectors have.
        assert response.status_code == 200 or field in ("model", "dimensions")


def failures_of(path: str) -> list[errors.ServeAppError]:
    return [cls("what went wrong") for cls in STATUSES if issubclass(cls, (errors.RequestError, errors.ServerError))]


@pytest.mark.parametrize("path", POSTS)
async def test_errors_are_as_documented(client: httpx.AsyncClient, service: FakeService, path: str) -> None:
    for failure in failures_of(path):
        if isinstance(failure, errors.MethodNotAllowedError):
            continue
        service.failure = failure
        response = await client.post(concrete(path), json=example_of(path))
        schema = schema_of(path, "post", response.status_code)
        jsonschema.validate(response.json(), schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("path", ["/ready", "/info", "/models/{name}/health", "/models/{name}/info"])
async def test_a_server_that_is_not_ready_says_so_as_documented(service: FakeService, path: str) -> None:
    async def unavailable(name: str | None = None) -> Any:
        raise errors.UnavailableError("starting")

    service.ready = service.info = unavailable  # type: ignore[method-assign,assignment]
    async with client_of(service) as client:
        response = await client.get(concrete(path))
    jsonschema.validate(response.json(), schema_of(path, "get", 503), jsonschema.Draft202012Validator)


async def test_several_models_are_offered_by_name_and_told_as_documented() -> None:
    async with client_of(FakeService("small", "large")) as client:
        document = (await client.get("/openapi.json")).json()
        parameter, _ = document["paths"]["/models/{name}/embed"]["post"]["parameters"]
        assert parameter["schema"]["enum"] == ["small", "large"]
        answer = (await client.get("/info")).json()
    jsonschema.validate(answer, schema_of("/info", "get", 200), jsonschema.Draft202012Validator)


async def test_the_page_needs_nothing_from_elsewhere(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assets = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {"docs/docs.css", "docs/docs.js", "openapi.json"} <= set(assets)
    for asset in assets:
        if asset != "data:,":
            assert (await client.get(f"/{asset}")).status_code == 200
    script = (await client.get("/docs/docs.js")).text
    assert not re.search(r"https?://|//cdn|innerHTML|eval\(", script)


async def test_the_root_leads_a_browser_to_the_page(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    assert (response.status_code, response.headers["location"]) == (307, "/docs")


async def test_the_document_is_written_in_a_thread_once_for_all_and_again_for_other_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[int] = []
    describe = openapi.describe

    def noted(*arguments: Any, **more: Any) -> Any:
        threads.append(threading.get_ident())
        return describe(*arguments, **more)

    monkeypatch.setattr(openapi, "describe", noted)
    service = FakeService("first")
    async with client_of(service) as client:
        for models in ((), ("first",), ("first", "second")):
            service.models = models
            threads.clear()
            documents = await asyncio.gather(*(client.get("/openapi.json") for _ in range(5)))
            assert len({document.text for document in documents}) == 1
            assert len(threads) == 1
            assert threading.get_ident() not in threads
            (name,) = documents[0].json()["paths"]["/models/{name}/info"]["get"]["parameters"]
            assert name["schema"].get("enum", []) == list(models)
