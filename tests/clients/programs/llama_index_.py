"""LlamaIndex: its classes for servers that are like OpenAI's, and for Text Embeddings Inference."""

from __future__ import annotations

from importlib.metadata import version

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from llama_index.llms.openai_like import OpenAILike
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from told import ASKED, DOCUMENTS, QUERY, TEXTS, places, tell

for place, url in places("embedding").items():
    like = OpenAILikeEmbedding(model_name="BAAI/bge-small-en-v1.5", api_base=f"{url}/v1", api_key="x")
    tell("vectors", f"OpenAILikeEmbedding, {place}", like.get_text_embedding_batch(TEXTS))
    tei = TextEmbeddingsInference(model_name="BAAI/bge-small-en-v1.5", base_url=url, text_instruction=" ")
    tell("vectors", f"TextEmbeddingsInference, {place}", tei.get_text_embedding_batch(TEXTS))

for place, url in places("rerank").items():
    if version("llama-index-postprocessor-tei-rerank").startswith("0.3."):  # it takes no notice of each score's `index`
        break
    rerank = TextEmbeddingInference(top_n=len(DOCUMENTS), base_url=url, model_name="BAAI/bge-reranker-large")
    nodes = [NodeWithScore(node=TextNode(text=each), score=0.0) for each in DOCUMENTS]
    found = rerank.postprocess_nodes(nodes, query_str=QUERY)
    tell("ranks", f"TextEmbeddingInference, {place}", [[DOCUMENTS.index(each.node.text), each.score] for each in found])

for place, url in places("text-generation").items():
    chats = OpenAILike(
        model="gpt-4o", api_base=f"{url}/v1", api_key="x", is_chat_model=True, temperature=0, max_tokens=8
    )
    message = ChatMessage(role="user", content=ASKED["prompt"])
    tell("chat", f"OpenAILike, {place}", chats.chat([message]).message.content)
    tell("chat", f"OpenAILike, streamed, {place}", "".join(each.delta or "" for each in chats.stream_chat([message])))
