"""The example of all tasks, served as it stands, answers each of README's lines in the shape told there."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from huggingface_hub import AsyncInferenceClient, InferenceClient

from deploy.examples.make_tiny_models import MODELS
from tests.cluster.client_tables import HUGGINGFACE, MESSAGES, TEXT, Call
from tests.live import Live, examples_served
from tests.test_readme import answers_of, blocks, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def all_tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with examples_served(tmp_path_factory.mktemp("models")) as live:
        yield live


def _has(*keys: str) -> Callable[[Any], bool]:
    return lambda answer: set(keys) == answer.keys()


def _each(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda answer: isinstance(answer, list) and len(answer) > 0 and all(check(item) for item in answer)


def _may_be_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda answer: answer == [] or _each(check)(answer)


SHAPES: dict[str, Callable[[Any], bool]] = {
    "sparse_embedding": _each(_each(_has("index", "value"))),
    "text_classification": _each(_each(_has("label", "score"))),
    "zero_shot": _each(_has("label", "score")),
    "rerank": _each(_has("index", "score", "text")),
    "token_classification": _may_be_none(_has("entity_group", "score", "word", "start", "end")),
    "fill_mask": _each(_has("score", "token", "token_str", "sequence")),
    "question_answering": _has("score", "start", "end", "answer"),
    "text_generation": _each(_has("generated_text")),
    "chat": lambda answer: answer["choices"][0]["message"].keys() == {"role", "content"},
    "text2text": _each(_has("generated_text")),
    "summarization": _each(_has("summary_text")),
    "translation": _each(_has("translation_text")),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_line_of_the_readme_is_answered_in_its_shape(name: str, all_tasks: Live) -> None:
    (answer,) = answers_of(run(blocks("task")[name], all_tasks.base_url))
    assert SHAPES[name](answer), answer


def test_a_streamed_answer_is_the_whole_one_in_pieces(all_tasks: Live) -> None:
    output = run(blocks("task")["text_generation_stream"], all_tasks.base_url)
    *events, last = [line.removeprefix("data: ") for line in output.split("\n\n") if line]
    assert last == "[DONE]"
    streamed = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    body = {"prompt": "Once upon a time", "max_tokens": 8}
    whole = httpx.post(f"{all_tasks.base_url}/models/text-generation/v1/completions", json=body, timeout=60).json()
    assert streamed == whole["choices"][0]["text"]


def test_every_line_for_a_task_is_run() -> None:
    assert blocks("task").keys() == {*SHAPES, "text_generation_stream"}


@pytest.mark.parametrize("name", ["embedding", "rerank", "text-generation", "text2text"])
def test_texts_of_any_length_are_tokenized_and_made_text_again(name: str, all_tasks: Live) -> None:
    text = "what is a cat? " * 400
    url = f"{all_tasks.base_url}/models/{name}"
    (tokens,) = httpx.post(f"{url}/tokenize", json={"inputs": text}, timeout=60).json()
    assert len(tokens) > 1600
    assert all(text[token["start"] : token["stop"]] == token["text"] for token in tokens if not token["special"])
    (again,) = httpx.post(f"{url}/decode", json={"ids": [token["id"] for token in tokens]}, timeout=60).json()
    assert again.replace(" ", "") == text.replace(" ", "")


def test_a_client_that_leaves_frees_its_place(all_tasks: Live) -> None:
    url = f"{all_tasks.base_url}/models/text-generation"
    body = {"inputs": "Once", "stream": True, "parameters": {"max_new_tokens": 400}}
    started = time.monotonic()
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        assert next(response.iter_lines()).startswith("data: ")
    answer = httpx.post(url, json={"inputs": "Once", "parameters": {"max_new_tokens": 2}}, timeout=60)
    assert answer.status_code == 200
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("name", MODELS)
def test_tritonclient_asks_any_model_what_its_metadata_tells(name: str, all_tasks: Live) -> None:
    """Over HTTP and gRPC, with the same answer."""
    answers = []
    packages = {triton_http: all_tasks.base_url.removeprefix("http://"), triton_grpc: all_tasks.grpc_address}
    for package, address in packages.items():
        with package.InferenceServerClient(address) as client:
            as_json = {} if package is triton_http else {"as_json": True}
            told = client.get_model_metadata(name, **as_json)
            inputs = [_tensor(package, each["name"], "Paris is the [MASK] of France.") for each in told["inputs"]]
            generates = name in ("text-generation", "text2text", "summarization", "translation")
            parameters = {"max_new_tokens": 4} if generates else {}
            answer = client.infer(name, inputs, parameters=parameters)
            answers.append([answer.as_numpy(each["name"]).tolist() for each in told["outputs"]])
    assert answers[0]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("call", HUGGINGFACE, ids=lambda call: f"{call.model}-{call.method}")
async def test_huggingface_hubs_clients_do_every_task(call: Call, all_tasks: Live) -> None:
    url = f"{all_tasks.base_url}/models/{call.model}"
    answer = getattr(InferenceClient(url, timeout=60), call.method)(*call.arguments, **call.options)
    async with AsyncInferenceClient(url, timeout=60) as client:
        assert np.array_equal(await getattr(client, call.method)(*call.arguments, **call.options), answer)
    assert len(answer)
    for item in answer if call.fields else ():
        assert [name for name in call.fields if getattr(item, name) is None] == []


def test_huggingface_hubs_client_streams_chats_and_asks_how_the_server_is(all_tasks: Live) -> None:
    client = InferenceClient(f"{all_tasks.base_url}/models/text-generation", provider="hf-inference", timeout=60)
    options = {"max_new_tokens": 8, "do_sample": True, "seed": 3}
    pieces = client.text_generation(TEXT, stream=True, details=True, **options)
    assert "".join(piece.token.text for piece in pieces) == client.text_generation(TEXT, **options)
    chat = client.chat_completion(MESSAGES, max_tokens=8, seed=3)
    streamed = client.chat_completion(MESSAGES, max_tokens=8, seed=3, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in streamed) == chat.choices[0].message.content
    assert client.health_check()
    assert client.get_endpoint_info()["served_model_name"] == "text-generation"


async def test_openais_clients_complete_chat_and_embed(all_tasks: Live) -> None:
    options = {"base_url": f"{all_tasks.base_url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60}
    completing = {"model": "text-generation", "prompt": TEXT, "max_tokens": 8, "seed": 3}
    chatting = {"model": "text-generation", "messages": MESSAGES, "max_tokens": 8, "seed": 3}
    client = openai.OpenAI(**options)
    assert set(MODELS) <= {model.id for model in client.models.list()}
    whole = client.completions.create(**completing).choices[0].text
    assert whole == "".join(piece.choices[0].text for piece in client.completions.create(**completing, stream=True))
    said = client.chat.completions.create(**chatting).choices[0].message.content
    vector = client.embeddings.create(model="embedding", input=[TEXT]).data[0].embedding
    async with openai.AsyncOpenAI(**options) as later:
        pieces = [piece async for piece in await later.chat.completions.create(**chatting, stream=True)]
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == said
        assert (await later.completions.create(**completing)).choices[0].text == whole
        again = await later.embeddings.create(model="embedding", input=TEXT, encoding_format="float")
    np.testing.assert_allclose(again.data[0].embedding, vector, atol=1e-6)


def _tensor(package: Any, name: str, text: str) -> Any:
    tensor = package.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], object))
    return tensor


def test_a_text_is_streamed_over_grpc(all_tasks: Live) -> None:
    responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
    told = []
    with triton_grpc.InferenceServerClient(all_tasks.grpc_address) as client:
        inputs = [_tensor(triton_grpc, "text", "Once upon a time")]
        (whole,) = client.infer("text-generation", inputs, parameters={"max_new_tokens": 8}).as_numpy("generated_text")
        client.start_stream(lambda result, error: responses.put((result, error)))
        client.async_stream_infer("text-generation", inputs, parameters={"max_new_tokens": 8})
        while not told or not told[-1].as_numpy("finish_reason")[0]:
            result, error = responses.get(timeout=60)
            assert error is None
            told.append(result)
        client.stop_stream()
    assert len(told) > 1
    assert b"".join(each.as_numpy("generated_text")[0] for each in told) == whole
