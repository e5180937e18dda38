"""The Open Inference Protocol v2, which Triton's client, KServe's and others speak, over HTTP and gRPC."""

from serve_app.ingress.protocols.open_inference import unsupported
from serve_app.ingress.protocols.open_inference.http import DIALECT, routes

__all__ = ["DIALECT", "routes", "unsupported"]
