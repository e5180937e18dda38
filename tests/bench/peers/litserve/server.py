"""server.py MODEL PORT: LitServe with dynamic batching around sentence-transformers, as in its guide to embeddings."""

import sys
from itertools import accumulate, pairwise
from typing import Any

import litserve
from sentence_transformers import SentenceTransformer


class Embed(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = SentenceTransformer(sys.argv[1], device="cpu")

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # an annotation would make it a query parameter
        return request["inputs"]

    def batch(self, inputs: list[list[str]]) -> list[list[str]]:
        return inputs

    def predict(self, requests: list[list[str]]) -> list[Any]:
        vectors = self.model.encode([text for texts in requests for text in texts])
        edges = [0, *accumulate(map(len, requests))]
        return [vectors[first:last] for first, last in pairwise(edges)]

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> list[list[float]]:
        vectors: list[list[float]] = output.tolist()
        return vectors


if __name__ == "__main__":
    api = Embed(max_batch_size=32, batch_timeout=0.005, api_path="/embed")
    litserve.LitServer(api, accelerator="cpu", timeout=600).run(
        host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning"
    )
