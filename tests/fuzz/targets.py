"""What is aimed at: every route of the OpenAPI document, for every model, and a good request for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.ingress.protocols.huggingface.endpoint import BODIES
from serve_app.ingress.protocols.open_inference.tasks import TASK_TENSORS
from serve_app.ingress.protocols.task_options import OPTIONS
from tests.fuzz.models import EMBEDDING, TASKS
from tests.fuzz.schemas import Schema

ANSWERS: Mapping[str, str] = {
    "/embed": EMBEDDING,
    "/embed_all": EMBEDDING,
    "/similarity": EMBEDDING,
    "/tokenize": EMBEDDING,
    "/decode": EMBEDDING,
    "/v1/embeddings": EMBEDDING,
    "/embeddings": EMBEDDING,
    "/embed_sparse": "sparse-embedding",
    "/predict": "text-classification",
    "/": "question-answering",
    "/rerank": "rerank",
    "/v1/rerank": "rerank",
    "/v2/rerank": "rerank",
    "/v1/completions": "text-generation",
    "/v1/chat/completions": "text-generation",
}
"""A model that can answer each path that names none."""

_GOOD: Mapping[str, Any] = {
    "zero-shot": {"inputs": "A fine cheese.", "parameters": {"candidate_labels": ["food", "sport"]}},
    "rerank": {"inputs": {"text": "What is a cat?", "text_pair": "A kitten is a young cat."}},
    "fill-mask": {"inputs": "Paris is the [MASK] of France."},
}
"""Where the example of the body that several tasks share is none for this one."""


@dataclass(frozen=True)
class Target:
    """A method and a path, and a body that suits it; None where it takes none."""

    method: str
    path: str
    model: str | None
    good: Any = None
    schema: Schema | None = None
    parameters: Schema | None = None
    """Those of the task, where the body's own schema leaves them open."""
    weight: int = 1
    """How many of all requests go here, compared with others."""

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def is_open_inference(self) -> bool:
        return self.path.endswith("/infer")


OF_THE_CLUSTER = frozenset({"/metrics", "/admin/cache"})
"""What only a server on Ray can answer."""


def targets(document: Schema) -> list[Target]:
    """In the order of the document."""
    return [
        _target(document, method, path, model)
        for path, operations in document["paths"].items()
        for method in operations
        for model in (TASKS if "{name}" in path else (None,))
    ]


def _target(document: Schema, method: str, path: str, model: str | None) -> Target:
    concrete = path.replace("{name}", model or "")
    if method == "get":
        return Target("GET", concrete, model)
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    tail = path.removeprefix("/models/{name}") or "/"
    if tail.endswith("/infer"):
        assert model is not None
        good, parameters = _tensors(TASKS[model]), OPTIONS[TASKS[model]].model_json_schema()
        return Target("POST", concrete, model, good, schema, parameters, weight=4)
    asked = model or ANSWERS[tail]
    if tail == "/":
        schema = {"$ref": f"#/components/schemas/{BODIES[TASKS[asked]].__name__}"}
    good = dict(_GOOD.get(asked, {}) if tail == "/" else {}) or dict(_example(document, schema))
    if tail.endswith("completions"):
        good |= {"temperature": 0, "max_tokens": 8}
    if model is None:
        good["model"] = asked
    fits = tail == "/" or asked == ANSWERS[tail]
    return Target("POST", concrete, asked, good, schema, weight=8 if fits else 1)


def _example(document: Schema, schema: Schema) -> Any:
    return document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]["examples"][0]


def _tensors(task: str) -> Any:
    names = [each.name for each in TASK_TENSORS[task].inputs]
    text = {"shape": [1], "datatype": "BYTES", "data": ["Paris is the [MASK] of France."]}
    few = {"parameters": {"max_new_tokens": 4}} if "generation" in task else {}
    return {"inputs": [{"name": name, **text} for name in names], **few}


def shares(aims: list[Target], requests: int) -> Iterator[tuple[Target, int]]:
    """How many of `requests` each target gets; at least as many together."""
    total = sum(target.weight for target in aims)
    for target in aims:
        yield target, -(-requests * target.weight // total)
