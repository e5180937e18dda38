"""huggingface_hub's InferenceClient, every task that a version of it has."""

from __future__ import annotations

import inspect

import huggingface_hub
from huggingface_hub import InferenceClient
from told import ASKED, DOCUMENTS, QUERY, TEXTS, places, tell

LABELS = ASKED["labels"]

for place, url in places("embedding").items():
    client = InferenceClient(url)
    tell("directions", f"feature_extraction, {place}", [client.feature_extraction(text)[0].tolist() for text in TEXTS])

for place, url in places("rerank").items():
    if huggingface_hub.__version__.startswith("0.28."):  # which sends `"inputs": null`, whatever it is asked
        break
    found = InferenceClient(url).sentence_similarity(QUERY, other_sentences=DOCUMENTS)
    tell("ranks", f"sentence_similarity, {place}", sorted(enumerate(found), key=lambda rank: -rank[1]))

for place, url in places("zero-shot").items():
    asks = InferenceClient(url).zero_shot_classification
    name = "labels" if "labels" in inspect.signature(asks).parameters else "candidate_labels"
    for multi in (False, True):
        found = asks(TEXTS[0], **{name: LABELS, "multi_label": multi})
        kind = "labels, each for itself" if multi else "labels"
        tell(kind, f"zero_shot_classification, {place}", [[each.label, each.score] for each in found])

for place, url in places("text-classification").items():
    found = InferenceClient(url).text_classification(TEXTS[0])
    tell("classes", f"text_classification, {place}", [[each.label, each.score] for each in found])

for place, url in places("text-generation").items():
    client = InferenceClient(url)
    answer = client.chat_completion([{"role": "user", "content": ASKED["prompt"]}], max_tokens=8, temperature=0)
    tell("chat", f"chat_completion, {place}", answer.choices[0].message.content)
    text = client.text_generation(ASKED["prompt"], max_new_tokens=8, do_sample=False)
    tell("completion", f"text_generation, {place}", text)
    pieces = client.text_generation(ASKED["prompt"], max_new_tokens=8, do_sample=False, stream=True)
    tell("completion", f"text_generation, streamed, {place}", "".join(pieces))
