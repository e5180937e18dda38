"""`/v1/rerank`, and `/v2/rerank` as Cohere's newer client posts it, in the shape that Cohere and Jina made usual."""

from __future__ import annotations

from serve_app.ingress.inference import Inference
from serve_app.ingress.protocols.fields import documented
from serve_app.ingress.protocols.openai.dialect import dialect_of
from serve_app.ingress.protocols.ranks import Documents, QueryFields, RerankList, write_results
from serve_app.ingress.routes import ANY_MODEL, COMPUTE_FAILURES, Route
from serve_app.types import Request

DIALECT = dialect_of("documents")


class RerankDocumentsBody(QueryFields):
    """A query, and documents to put in order by their relevance to it."""

    model_config = documented(query="What is Deep Learning?", documents=["Deep Learning is…", "A cheese."], top_n=1)

    documents: Documents

    def to_request(self, request_id: str, model: str) -> Request:
        return self.request(request_id, model, "rerank", (self.query, *self.documents), self.options())


def routes() -> tuple[Route, ...]:
    endpoint: Inference[RerankDocumentsBody] = Inference(RerankDocumentsBody, write_results)
    return tuple(
        Route(
            "POST",
            f"{place}/{version}/rerank",
            endpoint,
            DIALECT,
            "Order documents by relevance",
            answer=RerankList,
            body=RerankDocumentsBody,
            failures=COMPUTE_FAILURES,
        )
        for place in ANY_MODEL
        for version in ("v1", "v2")
    )
