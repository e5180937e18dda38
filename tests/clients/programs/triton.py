"""tritonclient over HTTP."""

from __future__ import annotations

import numpy as np
import tritonclient.http as triton
from told import ASKED, TEXTS, tell

for place, url in (("several", ASKED["several"]), ("only", ASKED["only"]["embedding"])):
    client = triton.InferenceServerClient(url.removeprefix("http://"))
    assert client.is_server_ready()
    text = triton.InferInput("text", [len(TEXTS)], "BYTES")
    text.set_data_from_numpy(np.array([each.encode() for each in TEXTS], object))
    answer = client.infer("embedding", [text], parameters={"normalize": True})
    tell("vectors", f"InferenceServerClient, {place}", answer.as_numpy("embedding").tolist())
