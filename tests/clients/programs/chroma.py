"""Chroma's embedding functions for OpenAI, and for servers like Text Embeddings Inference."""

from __future__ import annotations

from chromadb.utils.embedding_functions import HuggingFaceEmbeddingServer, OpenAIEmbeddingFunction
from told import TEXTS, places, tell

for place, url in places("embedding").items():
    openai = OpenAIEmbeddingFunction(api_key="x", api_base=f"{url}/v1", model_name="text-embedding-3-small")
    tell("vectors", f"OpenAIEmbeddingFunction, {place}", [list(map(float, each)) for each in openai(TEXTS)])
    server = HuggingFaceEmbeddingServer(url=f"{url}/embed")
    tell("vectors", f"HuggingFaceEmbeddingServer, {place}", [list(map(float, each)) for each in server(TEXTS)])
