"""OpenAI's own client."""

from __future__ import annotations

import openai
from told import ASKED, TEXTS, places, tell

for place, url in places("embedding").items():
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
    found = client.embeddings.create(model="text-embedding-3-small", input=TEXTS).data
    tell("vectors", f"embeddings, {place}", [each.embedding for each in found])

for place, url in places("text-generation").items():
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
    options = {"model": "gpt-4o", "temperature": 0, "max_tokens": 8}
    messages = [{"role": "user", "content": ASKED["prompt"]}]
    answer = client.chat.completions.create(messages=messages, **options)
    tell("chat", f"chat, {place}", answer.choices[0].message.content)
    pieces = client.chat.completions.create(messages=messages, stream=True, **options)
    tell("chat", f"chat, streamed, {place}", "".join(each.choices[0].delta.content or "" for each in pieces))
    answer = client.completions.create(prompt=ASKED["prompt"], **options)
    tell("completion", f"completion, {place}", answer.choices[0].text)
