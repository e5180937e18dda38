"""KServe's client of the Open Inference Protocol."""

from __future__ import annotations

import asyncio

from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from told import ASKED, TEXTS, tell


async def ask(place: str, url: str) -> None:
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, model_name="embedding")
    asked = InferInput(name="text", shape=[len(TEXTS)], datatype="BYTES", data=TEXTS)
    request = InferRequest(model_name="embedding", infer_inputs=[asked], parameters={"normalize": True})
    answer = await client.infer(url, request, model_name="embedding")
    (output,) = answer.outputs
    tell("vectors", f"InferenceRESTClient, {place}", output.as_numpy().tolist())


for where, root in (("several", ASKED["several"]), ("only", ASKED["only"]["embedding"])):
    asyncio.run(ask(where, root))
