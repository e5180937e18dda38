"""What a program is told on its command line, and how it tells what its client was answered.

A program runs in an environment of its client's own, with nothing of this project but this folder.
"""

from __future__ import annotations

import json
import sys
from typing import Any

ASKED: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
"""`several`: base URL of a server of several models; `only`: base URL of the server of one model, by task; and `texts`,
`query`, `documents`, `labels`, `prompt`; for single programs more.
"""
TEXTS: list[str] = ASKED.get("texts", [])
QUERY: str = ASKED.get("query", "")
DOCUMENTS: list[str] = ASKED.get("documents", [])


def places(model: str) -> dict[str, str]:
    """Where the model is asked: below its own path, and at the root of a server that has no other."""
    several = f"{ASKED['several']}/models/{model}"
    return {"several": several} | ({"only": ASKED["only"][model]} if model in ASKED["only"] else {})


def tell(kind: str, what: str, answer: Any) -> None:
    """One line of JSON: `kind` says what `answer` is compared with, `what` which call it was."""
    print(json.dumps({"kind": kind, "what": what, "answer": answer}), flush=True)
