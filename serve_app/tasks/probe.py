"""The least that proves a model: one short text through both tiers. A new version computes it before it is ready, and
readiness does where no request has proved the model lately.
"""

from __future__ import annotations

from serve_app.options import GenerationOptions
from serve_app.types import MaskArguments, TokenizeRequest

TEXT = TokenizeRequest(("ok",), "truncate")
"""What a tokenizer replica is asked."""

ONE_TOKEN = GenerationOptions(max_new_tokens=1, num_beams=1, do_sample=False)
"""What a model that generates is asked."""


def head_arguments(task: str) -> MaskArguments | None:
    """What the head of a model that is served for `task` needs to know of the text."""
    return MaskArguments(top_k=1) if task == "fill-mask" else None
