"""app.py MODEL PORT [batch]: Ray Serve's tutorials, with an embedding pipeline in place of theirs.

Without `batch` the application of "Getting started" (two replicas, one request at a time), with it that of the tutorial
on batching (`@serve.batch(max_batch_size=4)`). Serve's settings are the defaults.
"""

from __future__ import annotations

import sys

import torch
from ray import serve
from starlette.requests import Request
from transformers import pipeline


class Pipeline:
    def __init__(self, model: str) -> None:
        self.embed = pipeline("feature-extraction", model=model, device="cpu", dtype=torch.float32)

    def vectors(self, texts: list[str]) -> list[list[float]]:
        cut = {"truncation": True, "max_length": 256}
        hidden = self.embed(texts, return_tensors=True, tokenize_kwargs=cut)
        means = torch.stack([states[0].mean(0) for states in hidden])
        return torch.nn.functional.normalize(means).tolist()


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0.2, "num_gpus": 0})
class Embedder(Pipeline):
    async def __call__(self, request: Request) -> list[list[float]]:
        return self.vectors((await request.json())["inputs"])


@serve.deployment
class BatchEmbedder(Pipeline):
    @serve.batch(max_batch_size=4)
    async def batch(self, requests: list[list[str]]) -> list[list[list[float]]]:
        vectors = iter(self.vectors([text for texts in requests for text in texts]))
        return [[next(vectors) for _ in texts] for texts in requests]

    async def __call__(self, request: Request) -> list[list[float]]:
        return await self.batch((await request.json())["inputs"])


if __name__ == "__main__":
    model, port = sys.argv[1], int(sys.argv[2])
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(
        (BatchEmbedder if "batch" in sys.argv[3:] else Embedder).bind(model), route_prefix="/embed", blocking=True
    )
