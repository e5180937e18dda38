"""Text Embeddings Inference's shapes: bodies, defaults, headers and errors."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

from serve_app.options import (
    ClassificationOptions,
    EmbeddingOptions,
    RerankOptions,
    SimilarityOptions,
    SparseEmbeddingOptions,
    TokenEmbeddingOptions,
)
from tests.ingress.edge import FakeService, client_of, unit, vector


async def post(client: httpx.AsyncClient, path: str, body: Any) -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    ("inputs", "understood"),
    [
        ("a text", ("a text",)),
        (["a", "b"], ("a", "b")),
        ([5, 6, 7], ((5, 6, 7),)),
        ([[5, 6], [7]], ((5, 6), (7,))),
        (["a", [5, 6]], ("a", (5, 6))),
        ("NUL \x00 is text", ("NUL \x00 is text",)),
        ("\U0001f600 é", ("\U0001f600 é",)),
    ],
    ids=["text", "texts", "ids", "lists of ids", "a text and ids", "NUL", "beyond the basic plane"],
)
async def test_embed_takes_every_kind_of_input(
    client: httpx.AsyncClient, service: FakeService, inputs: Any, understood: tuple[Any, ...]
) -> None:
    answer = await post(client, "/embed", {"inputs": inputs})
    assert service.requests[0].inputs == understood
    np.testing.assert_array_equal(
        np.array(answer, np.float32), unit(np.stack([vector(value) for value in understood])).astype(np.float32)
    )


async def test_embed_normalizes_unless_told_otherwise(client: httpx.AsyncClient, service: FakeService) -> None:
    for body in ({"inputs": "a"}, {"inputs": "a", "normalize": False}, {"inputs": "a", "normalize": None}):
        await post(client, "/embed", body)
    options = [request.options for request in service.requests]
    assert options == [EmbeddingOptions(True), EmbeddingOptions(False), EmbeddingOptions(None)]


async def test_embed_passes_every_option_on(client: httpx.AsyncClient, service: FakeService) -> None:
    body = {
        "inputs": "a",
        "normalize": False,
        "truncate": False,
        "truncation_direction": "Left",
        "prompt_name": "query",
        "dimensions": 4,
    }
    answer = await post(client, "/embed", body)
    request = service.requests[0]
    assert request.options == EmbeddingOptions(False, 4, "query")
    assert (request.long_texts, request.truncation_side, request.task) == ("error", "left", "embedding")
    np.testing.assert_array_equal(np.array(answer, np.float32), vector("a", "query: ")[None, :4])


async def test_embed_cuts_to_dimensions_before_it_normalizes(client: httpx.AsyncClient) -> None:
    answer = await post(client, "/embed", {"inputs": "a", "dimensions": 5})
    np.testing.assert_allclose(np.array(answer), unit(vector("a")[None, :5]), rtol=1e-6)


@pytest.mark.parametrize("dimensions", [0, -1, 17, 10**30])
async def test_dimensions_beyond_the_model_are_refused(client: httpx.AsyncClient, dimensions: int) -> None:
    response = await client.post("/embed", json={"inputs": "a", "dimensions": dimensions})
    assert response.status_code == 422
    assert "1 to 16" in response.json()["error"]


async def test_an_unknown_prompt_is_refused_and_the_known_ones_are_named(client: httpx.AsyncClient) -> None:
    response = await client.post("/embed", json={"inputs": "a", "prompt_name": "nonsense"})
    assert response.status_code == 422
    assert "query" in response.json()["error"]


async def test_similarity_is_the_cosine_with_each_sentence(client: httpx.AsyncClient, service: FakeService) -> None:
    answer = await post(client, "/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b", "a"]}})
    source, other = unit(vector("a")), unit(vector("b"))
    np.testing.assert_allclose(answer, [source @ other, 1.0], rtol=1e-5)
    assert service.requests[0].task == "similarity"


async def test_similarity_takes_its_options_in_parameters(client: httpx.AsyncClient, service: FakeService) -> None:
    parameters = {"prompt_name": "query", "truncate": True, "truncation_direction": "left"}
    inputs = {"source_sentence": "a", "sentences": ["b"]}
    await post(client, "/similarity", {"inputs": inputs, "parameters": parameters})
    request = service.requests[0]
    assert request.options == SimilarityOptions("query")
    assert (request.long_texts, request.truncation_side) == ("truncate", "left")


async def test_unknown_fields_are_refused_by_name_unless_they_say_nothing(client: httpx.AsyncClient) -> None:
    await post(client, "/embed", {"inputs": "a", "from_the_future": None, "late_chunking": False, "user": "me"})
    response = await client.post("/embed", json={"inputs": "a", "from_the_future": [1, {"x": None}]})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_input")
    assert "`from_the_future`: is not supported here" in response.json()["error"]
    assert "dimensions" in response.json()["error"]


async def test_costs_are_told_in_teis_headers(client: httpx.AsyncClient, service: FakeService) -> None:
    service.device = "gpu"
    response = await client.post("/embed", json={"inputs": ["four", "and seven"]})
    told = {name: response.headers[name] for name in ("x-compute-type", "x-compute-characters", "x-compute-tokens")}
    assert told == {"x-compute-type": "gpu", "x-compute-characters": "13", "x-compute-tokens": "15"}
    times = [response.headers[f"x-{name}-time"] for name in ("tokenization", "queue", "inference")]
    assert times == ["1", "2", "40"]
    assert "forward;dur=40.50" in response.headers["server-timing"]
    assert int(response.headers["x-total-time"]) >= 0


@pytest.mark.parametrize(
    ("body", "status", "code", "said"),
    [
        ({}, 400, "malformed_request", "`inputs` is missing"),
        ({"inputs": None}, 400, "malformed_request", "`inputs` is null"),
        ({"inputs": 5}, 400, "malformed_request", "`inputs` is a number"),
        ({"inputs": {"a": 1}}, 400, "malformed_request", "`inputs` is an object"),
        ({"inputs": []}, 400, "empty_input", "`inputs` is empty"),
        ({"inputs": ["a", []]}, 400, "empty_input", "`inputs[1]` is an empty list"),
        ({"inputs": ["a", 5]}, 400, "malformed_request", "`inputs[1]` is a number"),
        ({"inputs": ["a", None]}, 400, "malformed_request", "`inputs[1]` is null"),
        ({"inputs": [["a"]]}, 400, "malformed_request", "`inputs[0]` is a list that is not all token ids"),
        ({"inputs": [1, 2.5]}, 400, "malformed_request", "`inputs[0]` is a number"),
        ({"inputs": [[1, True]]}, 400, "malformed_request", "`inputs[0]` is a list that is not all token ids"),
        ({"inputs": [-1]}, 400, "malformed_request", "token id outside"),
        ({"inputs": [2**31]}, 400, "malformed_request", "token id outside"),
        ({"inputs": "a", "truncate": "yes"}, 400, "malformed_request", "`truncate`: input should be a valid boolean"),
        ({"inputs": "a", "normalize": 1}, 400, "malformed_request", "`normalize`"),
        ({"inputs": "a", "truncation_direction": "up"}, 400, "malformed_request", "'left' or 'right'"),
        ({"inputs": "a", "dimensions": 2.5}, 400, "malformed_request", "`dimensions`"),
        ({"inputs": "a", "model": 5}, 400, "malformed_request", "`model`"),
        ([], 400, "malformed_request", "must be a JSON object"),
        ("text", 400, "malformed_request", "must be a JSON object"),
    ],
)
async def test_bad_input_is_told_in_one_sentence_that_names_the_field(
    client: httpx.AsyncClient, service: FakeService, body: Any, status: int, code: str, said: str
) -> None:
    response = await client.post("/embed", json=body)
    error = response.json()
    assert (response.status_code, error["code"]) == (status, code)
    assert said in error["error"]
    assert set(error) == {"error", "error_type", "code", "request_id"}
    assert error["error_type"] == ("Empty" if code == "empty_input" else "Validation")
    assert error["request_id"] == response.headers["x-request-id"]
    assert service.requests == []


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ("a", "`inputs` is a text"),
        ({}, "`inputs.source_sentence` is missing"),
        ({"source_sentence": "a"}, "`inputs.sentences` is missing"),
        ({"source_sentence": 5, "sentences": ["a"]}, "`inputs.source_sentence` is a number"),
        ({"source_sentence": "a", "sentences": "b"}, "`inputs.sentences` is a text"),
        ({"source_sentence": "a", "sentences": []}, "`inputs.sentences` is empty"),
        ({"source_sentence": "a", "sentences": ["b", 1]}, "`inputs.sentences[1]` is a number"),
    ],
)
async def test_bad_comparisons_are_told_likewise(client: httpx.AsyncClient, inputs: Any, said: str) -> None:
    response = await client.post("/similarity", json={"inputs": inputs})
    assert response.status_code == 400
    assert said in response.json()["error"]


async def test_errors_never_repeat_the_input(client: httpx.AsyncClient) -> None:
    canary = "a-secret-that-must-not-come-back"
    bodies: list[Any] = [
        {"inputs": {canary: canary}},
        {"inputs": [canary, 1]},
        {"inputs": "a", "truncate": canary},
        {"inputs": "a", "truncation_direction": canary},
        {"inputs": "a", "prompt_name": canary},
        {"inputs": {"source_sentence": canary}},
        canary,
    ]
    for path in ("/embed", "/similarity", "/", "/v1/embeddings"):
        for body in bodies:
            response = await client.post(path, json=body)
            assert response.status_code >= 400
            assert canary not in response.text


async def test_too_many_inputs_are_refused_as_one(service: FakeService) -> None:
    async with client_of(service, max_client_batch_size=3) as client:
        assert (await client.post("/embed", json={"inputs": ["a"] * 3})).status_code == 200
        response = await client.post("/embed", json={"inputs": ["a"] * 4})
    assert response.status_code == 422
    assert response.json()["code"] == "batch_too_large"
    assert "`inputs` has 4 items, and 3 are allowed" in response.json()["error"]
    assert len(service.requests) == 1


async def test_a_text_that_is_too_long_is_refused_and_its_place_told(service: FakeService) -> None:
    async with client_of(service, max_text_characters=10) as client:
        assert (await client.post("/embed", json={"inputs": "é" * 10})).status_code == 200
        response = await client.post("/embed", json={"inputs": ["a", "b" * 11]})
    assert response.status_code == 422
    assert response.json()["code"] == "input_too_long"
    assert "inputs[1]: has 11 characters" in response.json()["error"]


async def test_every_token_is_embedded(client: httpx.AsyncClient, service: FakeService) -> None:
    answer = await post(client, "/embed_all", {"inputs": ["a", [5, 6]], "prompt_name": "query"})
    assert np.array(answer).shape == (2, 3, 16)
    assert service.requests[0].options == TokenEmbeddingOptions("query")


async def test_sparse_embeddings_are_pairs_of_index_and_value(client: httpx.AsyncClient) -> None:
    answer = await post(client, "/embed_sparse", {"inputs": "a"})
    assert answer == [[{"index": 3, "value": 0.5}, {"index": 70, "value": 1.5}]]


PREDICTION = [{"score": 0.75, "label": "POSITIVE"}, {"score": 0.25, "label": "NEGATIVE"}]


@pytest.mark.parametrize(
    ("inputs", "understood", "answered"),
    [
        ("a", ("a",), PREDICTION),
        (["a", "b"], (("a", "b"),), PREDICTION),
        ([["a"], ["b", "c"]], ("a", ("b", "c")), [PREDICTION, PREDICTION]),
        ([["a"]], ("a",), [PREDICTION]),
        (["a", ""], (("a", ""),), PREDICTION),
        ([["", "b"], ["c"]], (("", "b"), "c"), [PREDICTION, PREDICTION]),
    ],
    ids=["text", "two texts are a pair", "batch", "batch of one", "no second text", "no first text"],
)
async def test_predict_tells_texts_pairs_and_batches_apart(
    client: httpx.AsyncClient, service: FakeService, inputs: Any, understood: tuple[Any, ...], answered: Any
) -> None:
    assert await post(client, "/predict", {"inputs": inputs, "raw_scores": True}) == answered
    assert service.requests[0].inputs == understood
    assert service.requests[0].options == ClassificationOptions(function="none")


@pytest.mark.parametrize("inputs", [[], [[]], ["a", "b", "c"], [["a"], "b"], [["a", "b", "c"]], [1, 2], {"a": 1}])
async def test_predict_refuses_what_is_neither(client: httpx.AsyncClient, service: FakeService, inputs: Any) -> None:
    assert (await client.post("/predict", json={"inputs": inputs})).status_code == 400
    assert service.requests == []


@pytest.mark.parametrize("inputs", ["", ["", ""], [["a", "b"], ["", ""]], [[""]]], ids=repr)
async def test_predict_takes_a_text_or_a_pair_without_anything(client: httpx.AsyncClient, inputs: Any) -> None:
    assert (await client.post("/predict", json={"inputs": inputs})).status_code == 200


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/models/tiny/v2/rerank"])
async def test_a_query_and_documents_may_be_empty_but_there_must_be_some(client: httpx.AsyncClient, path: str) -> None:
    field = "texts" if path == "/rerank" else "documents"
    for query, documents, status in (("q", ["a", ""], 200), ("", ["a"], 200), ("", ["a", ""], 200), ("q", [], 400)):
        response = await client.post(path, json={"query": query, field: documents})
        assert response.status_code == status
        if status == 400:
            assert "empty_input" in response.text


async def test_rerank_takes_documents_and_answers_as_v1_rerank_does(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    """As vLLM does, for whose clients (LiteLLM's is one) `/rerank` is the path."""
    service.task = "rerank"
    body = {"query": "q", "documents": ["a", {"text": "b"}, "c"], "top_n": 2, "return_documents": True}
    told = await post(client, "/v1/rerank", body)
    assert [each["document"] for each in told["results"]] == [{"text": "c"}, {"text": "b"}]
    for path in ("/rerank", "/models/tiny/rerank", "/"):
        answer = await post(client, path, body)
        assert answer.keys() == told.keys()
        assert answer["results"] == told["results"]
    assert {request.inputs for request in service.requests} == {("q", "a", "b", "c")}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "`texts` is missing"),
        ({"texts": ["a"], "documents": ["a"]}, "send either"),
        ({"documents": [1]}, "`documents[0]` is a number"),
        ({"documents": []}, "`documents` is empty"),
        ({"documents": None}, "`documents` is null"),
    ],
    ids=repr,
)
async def test_rerank_refuses_what_is_neither_or_both(
    client: httpx.AsyncClient, fields: dict[str, Any], told: str
) -> None:
    response = await client.post("/rerank", json={"query": "q", **fields})
    assert response.status_code == 400
    assert told in response.json()["error"]


async def test_rerank_tells_only_the_best_where_so_many_are_wanted(client: httpx.AsyncClient) -> None:
    answer = await post(client, "/rerank", {"query": "q", "texts": ["a", "b", "c"], "top_n": 1, "return_text": True})
    assert answer == [{"index": 2, "score": 0.25, "text": "c"}]


async def test_the_root_of_a_model_that_reranks_takes_what_rerank_takes(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.task = "rerank"
    body = {"query": "q", "texts": ["a", "b"], "return_text": True, "raw_scores": True}
    for path in ("/", "/models/tiny"):
        assert await post(client, path, body) == await post(client, "/rerank", body)
    assert await post(client, "/", {"inputs": {"source_sentence": "q", "sentences": ["a", "b"]}}) == [0.0, 0.125]


async def test_other_paths_of_teis_lead_to_the_same(client: httpx.AsyncClient) -> None:
    for path in ("", "/models/tiny"):
        told = await post(client, f"{path}/v1/embeddings", {"input": "a"})
        assert await post(client, f"{path}/embeddings", {"input": "a"}) == told
    assert (await client.get("/ping")).json() == (await client.get("/health")).json()


async def test_rerank_puts_the_best_first(client: httpx.AsyncClient, service: FakeService) -> None:
    body = {"query": "q", "texts": ["a", "b", "c"], "raw_scores": True, "truncate": True}
    assert await post(client, "/rerank", body) == [
        {"index": 2, "score": 0.25},
        {"index": 1, "score": 0.125},
        {"index": 0, "score": 0.0},
    ]
    assert service.requests[0].inputs == ("q", "a", "b", "c")
    assert service.requests[0].options == RerankOptions(raw_scores=True)
    told = await post(client, "/rerank", {**body, "return_text": True})
    assert [rank["text"] for rank in told] == ["c", "b", "a"]


async def test_texts_are_tokenized_with_and_without_special_tokens(client: httpx.AsyncClient) -> None:
    special = {"id": 0, "text": "[CLS]", "special": True, "start": None, "stop": None}
    letter = {"id": 97, "text": "a", "special": False, "start": 0, "stop": 1}
    assert await post(client, "/tokenize", {"inputs": "a"}) == [[special, letter]]
    assert await post(client, "/tokenize", {"inputs": ["a", "a"], "add_special_tokens": False}) == [[letter]] * 2


async def test_tokens_become_text_again(client: httpx.AsyncClient) -> None:
    assert await post(client, "/decode", {"ids": [97, 98]}) == ["ab"]
    assert await post(client, "/decode", {"ids": [[97], [98, 99]]}) == ["a", "bc"]


@pytest.mark.parametrize("ids", [[], [[]], [[1], 2], [1, [2]], ["a"], [-1], 5, None])
async def test_decode_takes_token_ids_only(client: httpx.AsyncClient, ids: Any) -> None:
    assert (await client.post("/decode", json={"ids": ids})).status_code == 400


async def test_a_prompt_stands_before_what_is_tokenized(client: httpx.AsyncClient) -> None:
    (tokens,) = await post(client, "/tokenize", {"inputs": "a", "prompt_name": "query", "add_special_tokens": False})
    assert "".join(token["text"] for token in tokens) == "query: a"
    assert (tokens[-1]["start"], tokens[-1]["stop"]) == (7, 8)


async def test_a_prompt_that_the_model_does_not_have_is_refused_where_texts_are_tokenized(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post("/tokenize", json={"inputs": "a", "prompt_name": "other"})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_input")


async def test_sparse_embeddings_take_a_prompt(client: httpx.AsyncClient, service: FakeService) -> None:
    service.task = "sparse-embedding"
    await post(client, "/embed_sparse", {"inputs": "a", "prompt_name": "query"})
    await post(client, "/", {"inputs": "a", "prompt_name": "query"})
    assert [request.options for request in service.requests] == [SparseEmbeddingOptions("query")] * 2


async def test_texts_to_tokenize_have_the_limits_of_other_texts(service: FakeService) -> None:
    async with client_of(service, max_client_batch_size=2, max_text_characters=10) as client:
        assert (await client.post("/tokenize", json={"inputs": ["a"] * 3})).json()["code"] == "batch_too_large"
        assert (await client.post("/tokenize", json={"inputs": "a" * 11})).json()["code"] == "input_too_long"
        assert (await client.post("/decode", json={"ids": [1] * 11})).json()["code"] == "input_too_long"


async def test_the_query_counts_once_for_each_text_of_a_rerank(service: FakeService) -> None:
    async with client_of(service, max_text_characters=100) as client:
        response = await client.post("/rerank", json={"query": "q" * 90, "texts": ["a"] * 5})
    assert response.json()["code"] == "batch_too_large"
