"""Cohere's own client, of both versions of its API."""

from __future__ import annotations

import cohere
from told import DOCUMENTS, QUERY, places, tell

for place, url in places("rerank").items():
    for kind in ("Client", "ClientV2"):
        if not hasattr(cohere, kind):  # each version has one of them, or both
            continue
        client = getattr(cohere, kind)(api_key="x", base_url=url)
        found = client.rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS).results
        tell("ranks", f"{kind}, {place}", [[each.index, each.relevance_score] for each in found])
