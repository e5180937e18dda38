"""LangChain: its classes for OpenAI, Hugging Face and Cohere."""

from __future__ import annotations

from langchain_cohere import CohereRerank
from langchain_core.documents import Document
from langchain_huggingface import HuggingFaceEndpointEmbeddings
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from told import ASKED, DOCUMENTS, QUERY, TEXTS, places, tell

for place, url in places("embedding").items():
    openai = OpenAIEmbeddings(
        model="text-embedding-3-small", base_url=f"{url}/v1", api_key="x", check_embedding_ctx_length=False
    )
    tell("vectors", f"OpenAIEmbeddings, {place}", openai.embed_documents(TEXTS))
    tell("vector", f"OpenAIEmbeddings of a query, {place}", openai.embed_query(TEXTS[0]))
    if ASKED["takes_urls"]:  # which langchain-huggingface does before 1.2
        hub = HuggingFaceEndpointEmbeddings(model=url, huggingfacehub_api_token="x")
        tell("directions", f"HuggingFaceEndpointEmbeddings, {place}", hub.embed_documents(TEXTS))

url = places("embedding")["only"]
many = OpenAIEmbeddings(model="a", base_url=f"{url}/v1", api_key="x", check_embedding_ctx_length=False, max_retries=0)
documents = [f"{index} {'small words ' * 400}"[:4000] for index in range(600)]
tell("many", "OpenAIEmbeddings of 600 documents of 4,000 characters", len(many.embed_documents(documents)))

for place, url in places("rerank").items():
    rerank = CohereRerank(cohere_api_key="x", base_url=url, model="rerank-v3.5", top_n=len(DOCUMENTS))
    found = rerank.compress_documents([Document(page_content=each) for each in DOCUMENTS], QUERY)
    ranks = [[DOCUMENTS.index(each.page_content), each.metadata["relevance_score"]] for each in found]
    tell("ranks", f"CohereRerank, {place}", ranks)

for place, url in places("text-generation").items():
    chat = ChatOpenAI(model="gpt-4o", base_url=f"{url}/v1", api_key="x", temperature=0, max_tokens=8)
    tell("chat", f"ChatOpenAI, {place}", chat.invoke(ASKED["prompt"]).content)
    tell("chat", f"ChatOpenAI, streamed, {place}", "".join(piece.content for piece in chat.stream(ASKED["prompt"])))
    complete = OpenAI(model="gpt-4o", base_url=f"{url}/v1", api_key="x", temperature=0, max_tokens=8)
    tell("completion", f"OpenAI, {place}", complete.invoke(ASKED["prompt"]))
