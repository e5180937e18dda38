"""Routes of Triton's own extensions that are not served: 404 that says so, instead of a model of that name."""

from __future__ import annotations

from serve_app.errors import RouteNotFoundError
from serve_app.ingress.exchange import Exchange, Reply
from serve_app.ingress.protocols.open_inference.http import DIALECT
from serve_app.ingress.routes import Endpoint, Method, Route

_REPOSITORY = "the model repository: which models are served is in /info, and models are configured before the start"
_CONFIG = "model configurations: GET /v2/models/<name> tells the tensors, /info the rest"
_STATISTICS = "statistics: /metrics has them"
_SHARED = "shared memory: send tensors in the request"
_SETTINGS = "settings at run time"
_GENERATE = "Triton's generate: post to /v2/models/<name>/infer, or to /models/<name> as to Text Generation Inference"

_MODEL = ("/v2/models/{name}", "/v2/models/{name}/versions/1")
_MEMORY = tuple(f"/v2/{kind}sharedmemory" for kind in ("system", "cuda"))

_UNSUPPORTED: tuple[tuple[Method, str, str], ...] = (
    ("POST", "/v2/repository/index", _REPOSITORY),
    ("POST", "/v2/repository/models/{name}/load", _REPOSITORY),
    ("POST", "/v2/repository/models/{name}/unload", _REPOSITORY),
    ("GET", "/v2/models/stats", _STATISTICS),
    *(("GET", f"{path}/stats", _STATISTICS) for path in _MODEL),
    *(("GET", f"{path}/config", _CONFIG) for path in _MODEL),
    *(("POST", f"{path}/generate", _GENERATE) for path in _MODEL),
    *(("POST", f"{path}/generate_stream", _GENERATE) for path in _MODEL),
    *(("GET", f"{path}/status", _SHARED) for path in _MEMORY),
    *(("GET", f"{path}/region/{{name}}/status", _SHARED) for path in _MEMORY),
    *(("POST", f"{path}/region/{{name}}/register", _SHARED) for path in _MEMORY),
    *(("POST", f"{path}/region/{{name}}/unregister", _SHARED) for path in _MEMORY),
    *(("POST", f"{path}/unregister", _SHARED) for path in _MEMORY),
    *((method, "/v2/logging", _SETTINGS) for method in ("GET", "POST")),
    *((method, "/v2/trace/setting", _SETTINGS) for method in ("GET", "POST")),
    *((method, "/v2/models/{name}/trace/setting", _SETTINGS) for method in ("GET", "POST")),
)


def routes() -> tuple[Route, ...]:
    """None of them is documented, because none does anything."""
    return tuple(Route(method, path, _refusal(what), DIALECT, "Not supported") for method, path, what in _UNSUPPORTED)


def _refusal(what: str) -> Endpoint:
    async def endpoint(exchange: Exchange) -> Reply:
        raise RouteNotFoundError(f"this server does not support {what}")

    return endpoint
