"""MLServer's types and codecs of the Open Inference Protocol, over plain HTTP."""

from __future__ import annotations

import json
import urllib.request

from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import (
    InferenceRequest,
    InferenceResponse,
    MetadataModelResponse,
    MetadataServerResponse,
    Parameters,
)
from told import ASKED, TEXTS, tell

for place, url in (("several", ASKED["several"]), ("only", ASKED["only"]["embedding"])):
    MetadataServerResponse.model_validate(json.load(urllib.request.urlopen(f"{url}/v2")))
    described = MetadataModelResponse.model_validate(json.load(urllib.request.urlopen(f"{url}/v2/models/embedding")))
    assert described.name == "embedding"
    asked = InferenceRequest(
        parameters=Parameters(normalize=True), inputs=[StringCodec.encode_input("text", TEXTS, use_bytes=False)]
    )
    body = asked.model_dump_json().encode()
    post = urllib.request.Request(f"{url}/v2/models/embedding/infer", body, {"content-type": "application/json"})
    answer = InferenceResponse.model_validate(json.load(urllib.request.urlopen(post)))
    tell("vectors", f"InferenceRequest, {place}", NumpyCodec.decode_output(answer.outputs[0]).tolist())
