"""How these routes write errors: as the client parses them."""

from __future__ import annotations

from serve_app.ingress.protocols.envelope import ErrorBody, write_error
from serve_app.ingress.routes import Dialect

DIALECT = Dialect("Hugging Face", write_error, ErrorBody)
