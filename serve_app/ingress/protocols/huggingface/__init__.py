"""What `huggingface_hub.InferenceClient` posts to the very URL it is given: the root, or a model's own path.

One URL answers every task that its model has: the task the model is served for says how a body is read, and the shape
of `inputs` and `parameters` which of the model's tasks it asks for.
"""

from __future__ import annotations

from serve_app.ingress.protocols.huggingface.dialect import DIALECT
from serve_app.ingress.protocols.huggingface.endpoint import routes

__all__ = ["DIALECT", "routes"]
