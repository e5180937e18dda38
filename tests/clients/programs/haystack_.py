"""Haystack: its components for OpenAI, and for Text Embeddings Inference."""

from __future__ import annotations

from haystack import Document
from haystack.components.embedders import OpenAIDocumentEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from told import ASKED, DOCUMENTS, QUERY, TEXTS, places, tell

try:  # since Haystack 3, of the package huggingface-api-haystack
    from haystack_integrations.components.embedders.huggingface_api import (
        HuggingFaceAPIDocumentEmbedder,
        HuggingFaceAPITextEmbedder,
    )
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker
except ModuleNotFoundError:
    from haystack.components.embedders import HuggingFaceAPIDocumentEmbedder, HuggingFaceAPITextEmbedder
    from haystack.components.rankers import HuggingFaceTEIRanker

KEY = Secret.from_token("x")

for place, url in places("embedding").items():
    openai = OpenAIDocumentEmbedder(api_key=KEY, api_base_url=f"{url}/v1", progress_bar=False)
    found = openai.run([Document(content=text) for text in TEXTS])["documents"]
    tell("vectors", f"OpenAIDocumentEmbedder, {place}", [list(each.embedding) for each in found])
    kind, where = "text_embeddings_inference", {"url": url}
    tei = HuggingFaceAPIDocumentEmbedder(api_type=kind, api_params=where, token=KEY, normalize=True, progress_bar=False)
    found = tei.run([Document(content=text) for text in TEXTS])["documents"]
    tell("vectors", f"HuggingFaceAPIDocumentEmbedder, {place}", [list(each.embedding) for each in found])
    text = HuggingFaceAPITextEmbedder(api_type=kind, api_params=where, token=KEY, normalize=True)
    tell("vector", f"HuggingFaceAPITextEmbedder, {place}", list(text.run(TEXTS[0])["embedding"]))

for place, url in places("rerank").items():
    ranker = HuggingFaceTEIRanker(url=url, top_k=len(DOCUMENTS), token=KEY)
    found = ranker.run(query=QUERY, documents=[Document(content=each) for each in DOCUMENTS])["documents"]
    tell("ranks", f"HuggingFaceTEIRanker, {place}", [[DOCUMENTS.index(each.content), each.score] for each in found])

for place, url in places("text-generation").items():
    options = {"temperature": 0, "max_tokens": 8}
    chats = OpenAIChatGenerator(api_key=KEY, api_base_url=f"{url}/v1", model="gpt-4o", generation_kwargs=options)
    tell(
        "chat", f"OpenAIChatGenerator, {place}", chats.run([ChatMessage.from_user(ASKED["prompt"])])["replies"][0].text
    )
