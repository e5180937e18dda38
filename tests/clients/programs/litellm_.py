"""LiteLLM: its providers for servers of one's own."""

from __future__ import annotations

import litellm
from told import ASKED, DOCUMENTS, QUERY, TEXTS, places, tell

litellm.telemetry = False

for place, url in places("embedding").items():
    answer = litellm.embedding(model="openai/any-model", input=TEXTS, api_base=f"{url}/v1", api_key="x")
    tell("vectors", f"openai, {place}", [each["embedding"] for each in answer.data])

for place, url in places("rerank").items():
    for provider in ("huggingface", "hosted_vllm"):
        found = litellm.rerank(
            model=f"{provider}/any-model", query=QUERY, documents=DOCUMENTS, api_base=url, api_key="x", top_n=3
        )
        ranks = [[each["index"], each["relevance_score"]] for each in found.results]
        tell("ranks", f"{provider}, {place}", sorted(ranks, key=lambda rank: -rank[1]))

for place, url in places("text-generation").items():
    message = {"role": "user", "content": ASKED["prompt"]}
    asked = {"model": "openai/gpt-any", "messages": [message], "api_base": f"{url}/v1", "api_key": "x"}
    answer = litellm.completion(**asked, temperature=0, max_tokens=8)
    tell("chat", f"openai, {place}", answer.choices[0].message.content)
    pieces = litellm.completion(**asked, temperature=0, max_tokens=8, stream=True)
    tell("chat", f"openai, streamed, {place}", "".join(each.choices[0].delta.content or "" for each in pieces))
