"""OpenAI's API: `/v1/embeddings`, `/v1/completions`, `/v1/chat/completions`, `/v1/models`; and `/v1/rerank`."""

from __future__ import annotations

from serve_app.ingress.protocols.openai import chat, completions, embeddings, models, rerank
from serve_app.ingress.protocols.openai.dialect import DIALECT
from serve_app.ingress.routes import Route

__all__ = ["DIALECT", "routes"]


def routes() -> tuple[Route, ...]:
    return (
        *embeddings.routes(),
        *completions.routes(),
        *chat.routes(),
        *rerank.routes(),
        *models.routes(),
    )
