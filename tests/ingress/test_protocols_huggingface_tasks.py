"""What the root answers for models of every task: how bodies are read, and the shapes of answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from serve_app import options
from serve_app.config import TaskName
from serve_app.ingress.protocols.huggingface.endpoint import BODIES
from serve_app.tasks.generation import GENERATING
from serve_app.types import Request
from tests.ingress.edge import FakeService, client_of


async def asked(task: str, body: dict[str, Any]) -> tuple[Any, Request]:
    """The answer of a model of that task, and the request it was."""
    service = FakeService(task=task)
    async with client_of(service) as client:
        response = await client.post("/", json=body)
    assert response.status_code == 200, response.text
    return response.json(), service.requests[0]


async def refused(task: str, body: dict[str, Any]) -> httpx.Response:
    service = FakeService(task=task)
    async with client_of(service) as client:
        response = await client.post("/", json=body)
    assert service.requests == []
    return response


def test_every_task_that_can_be_configured_has_a_body() -> None:
    assert BODIES.keys() == set(TaskName.__args__)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("inputs", "understood"),
    [
        ("a", ("a",)),
        ("", ("",)),
        (["a", "b"], ("a", "b")),
        ({"text": "a"}, ("a",)),
        ({"text": "a", "text_pair": "b"}, (("a", "b"),)),
        ([["a", "b"], "c", {"text": "d", "text_pair": "e"}], (("a", "b"), "c", ("d", "e"))),
    ],
    ids=["text", "empty text", "texts", "object", "pair", "a mix"],
)
async def test_classification_takes_texts_and_pairs(inputs: Any, understood: tuple[Any, ...]) -> None:
    answer, request = await asked("text-classification", {"inputs": inputs})
    assert (request.task, request.inputs) == ("text-classification", understood)
    assert answer == [[{"label": "POSITIVE", "score": 0.75}, {"label": "NEGATIVE", "score": 0.25}]] * len(understood)


async def test_classification_takes_its_options() -> None:
    parameters = {"top_k": 1, "function_to_apply": "sigmoid", "over_windows": "max"}
    answer, request = await asked("text-classification", {"inputs": "a", "parameters": parameters})
    assert request.options == options.ClassificationOptions(1, "sigmoid", "max")
    assert len(answer[0]) == 1


@pytest.mark.parametrize("task", ["text-classification", "rerank", "zero-shot-classification"])
async def test_one_head_is_read_three_ways_by_the_shape_of_the_body(task: str) -> None:
    _, plain = await asked(task, {"inputs": "a"})
    labels, zero_shot = await asked(task, {"inputs": "a", "parameters": {"candidate_labels": ["x", "y"]}})
    scores, rerank = await asked(task, {"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}})
    assert [each.task for each in (plain, zero_shot, rerank)] == [
        "text-classification",
        "zero-shot-classification",
        "rerank",
    ]
    assert labels == [{"label": "x", "score": 0.5}, {"label": "y", "score": 0.5}]
    assert scores == [0.0, 0.125]


async def test_zero_shot_takes_its_options_and_labels_with_commas() -> None:
    parameters = {"candidate_labels": "x, y", "multi_label": True, "hypothesis_template": "It is {}!"}
    answer, request = await asked("zero-shot-classification", {"inputs": ["a", "b"], "parameters": parameters})
    assert request.options == options.ZeroShotOptions(("x", "y"), True, "It is {}!")
    assert len(answer) == 2


OBJECTS = [{"label": "x", "score": 0.5}, {"label": "y", "score": 0.5}]
PIPELINES = {"sequence": "a", "labels": ["x", "y"], "scores": [0.5, 0.5]}


@pytest.mark.parametrize(
    ("client", "one"),
    [
        ("unknown/None; hf_hub/0.23.4; python/3.11.7", PIPELINES),
        ("unknown/None; hf_hub/1.1.4; python/3.11.7", PIPELINES),
        ("unknown/None; hf_hub/1.1.5; python/3.11.7", OBJECTS),
        ("unknown/None; hf_hub/2.4.0; python/3.11.7", OBJECTS),
        ("unknown/None; hf_hub/0.30.0.dev0; python/3.11.7", PIPELINES),
        ("@huggingface/inference/4.4.0 Node.js/22", [PIPELINES]),
        ("@huggingface/inference/4.5.0 Node.js/22", OBJECTS),
        ("nothf_hub/0.1", OBJECTS),
        ("hf_hub/", OBJECTS),
        ("curl/8.5.0", OBJECTS),
    ],
)
async def test_zero_shot_is_answered_in_the_shape_that_the_version_of_the_client_reads(client: str, one: Any) -> None:
    body = {"inputs": "a", "parameters": {"candidate_labels": ["x", "y"]}}
    async with client_of(FakeService(task="zero-shot-classification")) as asks:
        answer = await asks.post("/", json=body, headers={"user-agent": client})
        several = await asks.post("/", json={**body, "inputs": ["a"]}, headers={"user-agent": client})
    assert answer.json() == one
    assert several.json() == (one if one == [PIPELINES] else [one])


@pytest.mark.parametrize(
    ("parameters", "status"),
    [
        ({"candidate_labels": []}, 400),
        ({"candidate_labels": ["a"], "hypothesis_template": "no place"}, 422),
        ({"candidate_labels": ["a"], "hypothesis_template": "{0} {}"}, 422),
        ({"candidate_labels": [f"label {i}" for i in range(3000)]}, 422),
    ],
    ids=["no label", "no place", "a format", "3,000 labels"],
)
async def test_zero_shot_refuses_what_makes_no_sense(parameters: dict[str, Any], status: int) -> None:
    response = await refused("zero-shot-classification", {"inputs": "a", "parameters": parameters})
    assert response.status_code == status


async def test_many_labels_of_a_long_text_are_refused_before_they_become_gigabytes() -> None:
    labels = [str(i) for i in range(1000)]
    response = await refused(
        "zero-shot-classification", {"inputs": "a" * 500_000, "parameters": {"candidate_labels": labels}}
    )
    assert response.json()["code"] == "batch_too_large"


async def test_entities_are_told_as_the_pipeline_tells_them() -> None:
    single, request = await asked("token-classification", {"inputs": "my name is sarah"})
    place = {"score": 0.9, "word": "sarah", "start": 11, "end": 16}
    assert single == [{"entity": "PER", "index": 4, **place}]
    assert request.options == options.TokenClassificationOptions()
    parameters = {"aggregation_strategy": "max", "ignore_labels": []}
    several, request = await asked("token-classification", {"inputs": ["a", "b"], "parameters": parameters})
    assert several == [[{"entity_group": "PER", **place}]] * 2
    assert request.options == options.TokenClassificationOptions("max", ())


async def test_a_stride_alone_asks_for_windows_of_entities() -> None:
    _, request = await asked("token-classification", {"inputs": "a", "parameters": {"stride": 7}})
    assert (request.long_texts, request.stride) == ("windows", 7)


async def test_masks_are_filled_as_the_pipeline_tells_them() -> None:
    one, request = await asked("fill-mask", {"inputs": "the [MASK]", "parameters": {"top_k": 1}})
    assert one == [{"score": 0.5, "token": 7, "token_str": "capital", "sequence": "the capital"}]
    assert request.options == options.FillMaskOptions(1)
    two, _ = await asked("fill-mask", {"inputs": "[MASK] [MASK]"})
    assert [len(fills) for fills in two] == [2, 2]
    several, request = await asked("fill-mask", {"inputs": ["[MASK]"], "parameters": {"targets": ["x"]}})
    assert len(several[0]) == 2
    assert request.options == options.FillMaskOptions(5, ("x",))


async def test_questions_are_answered_with_one_span_or_several() -> None:
    inputs = {"question": "where?", "context": "in London"}
    best, request = await asked("question-answering", {"inputs": inputs})
    assert best == {"answer": "London", "score": 0.9, "start": 3, "end": 9}
    assert request.inputs == (("where?", "in London"),)
    assert request.options == options.QuestionAnsweringOptions()
    parameters = {"top_k": 2, "doc_stride": 3, "max_answer_len": 4, "handle_impossible_answer": True}
    two, request = await asked("question-answering", {"inputs": [inputs], "parameters": parameters})
    assert [[span["answer"] for span in spans] for spans in two] == [["London", "Sarah"]]
    assert request.options == options.QuestionAnsweringOptions(
        top_k=2, doc_stride=3, max_answer_len=4, handle_impossible_answer=True
    )


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ("text2text-generation", "generated_text"),
        ("summarization", "summary_text"),
        ("translation", "translation_text"),
    ],
)
async def test_texts_made_of_texts_have_the_key_of_their_task(task: str, key: str) -> None:
    parameters = {"max_new_tokens": 3, "generate_parameters": {"num_beams": 2, "max_new_tokens": 9}}
    answer, request = await asked(task, {"inputs": ["a", "b"], "parameters": parameters})
    assert answer == [{key: "Once upon a time"}] * 2
    assert request.task == task
    assert request.options == options.GenerationOptions(max_new_tokens=9, num_beams=2)


async def test_translation_takes_languages_and_truncation() -> None:
    parameters = {"src_lang": "en", "tgt_lang": "de", "truncation": "do_not_truncate"}
    _, request = await asked("translation", {"inputs": "a", "parameters": parameters})
    assert request.options == options.GenerationOptions(source_language="en", target_language="de")
    assert request.long_texts == "error"


async def test_generation_takes_the_parameters_of_text_generation_inference() -> None:
    parameters = {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["\n"],
        "return_full_text": True,
    }
    answer, request = await asked("text-generation", {"inputs": "a", "parameters": parameters})
    assert answer == [{"generated_text": "Once upon a time"}]
    assert request.options == options.GenerationOptions(
        max_new_tokens=5, do_sample=True, temperature=0.5, top_p=0.9, seed=7, stop=("\n",), echo=True
    )


async def test_temperature_0_is_greedy() -> None:
    _, request = await asked("text-generation", {"inputs": "a", "parameters": {"temperature": 0}})
    assert request.options == options.GenerationOptions(do_sample=False)


async def test_details_tell_tokens_and_why_the_answer_ended() -> None:
    parameters = {"details": True, "top_n_tokens": 1}
    (answer,), _ = await asked("text-generation", {"inputs": "a", "parameters": parameters})
    details = answer["details"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("length", 4)
    assert details["tokens"][1] == {"id": 11, "text": " upon", "logprob": -0.5, "special": False}
    assert details["top_tokens"][0][0]["text"] == "x"


@pytest.mark.parametrize("name", ["best_of", "frequency_penalty", "watermark", "grammar", "adapter_id"])
async def test_what_is_not_supported_is_refused_by_name(name: str) -> None:
    value = {"grammar": {"type": "json"}, "adapter_id": "x", "watermark": True}.get(name, 2)
    response = await refused("text-generation", {"inputs": "a", "parameters": {name: value}})
    assert response.status_code == 422
    assert name in response.json()["error"]


@pytest.mark.parametrize("task", sorted(set(BODIES) - {"embedding"}))
async def test_every_task_takes_the_choice_of_what_becomes_of_long_texts(task: str) -> None:
    example = BODIES[task].model_config["json_schema_extra"]["examples"][0]  # type: ignore[index,call-overload]
    chosen = {"long_texts": "windows", "stride": 5, "truncation_direction": "left"}
    body = {**example, "parameters": {**example.get("parameters", {}), **chosen}}
    _, request = await asked(task, body)
    assert (request.long_texts, request.stride, request.truncation_side) == ("windows", 5, "left")


@pytest.mark.parametrize("task", sorted(set(BODIES) - set(GENERATING)))
async def test_every_task_that_answers_at_once_takes_the_choice_beside_the_inputs(task: str) -> None:
    example = BODIES[task].model_config["json_schema_extra"]["examples"][0]  # type: ignore[index,call-overload]
    nested = {**example.get("parameters", {}), "truncate": True, "truncation_direction": "right"}
    for parameters in ({}, {"parameters": nested}):
        body = {**example, "truncate": False, "stride": 5, "truncation_direction": "left", **parameters}
        _, request = await asked(task, body)
        assert (request.long_texts, request.stride, request.truncation_side) == ("error", 5, "left")


async def test_headers_tell_what_was_cut_and_what_was_read_in_windows() -> None:
    service = FakeService(task="text-classification")
    service.long_texts = (2, 9)
    async with client_of(service) as client:
        response = await client.post("/", json={"inputs": "a"})
    assert response.headers["x-truncated-inputs"] == "2"
    assert response.headers["x-windows"] == "9"


async def test_one_of_several_models_is_asked_by_its_own_task() -> None:
    service = FakeService("vectors", "labels", tasks={"labels": "text-classification"})
    async with client_of(service) as client:
        labels = await client.post("/models/labels", json={"inputs": "a"})
        named = await client.post("/", json={"inputs": "a", "model": "labels"})
        vectors = await client.post("/models/vectors", json={"inputs": "a"})
        nameless = await client.post("/", json={"inputs": "a"})
    assert (
        labels.json() == named.json() == [[{"label": "POSITIVE", "score": 0.75}, {"label": "NEGATIVE", "score": 0.25}]]
    )
    assert len(vectors.json()[0]) == 16
    assert nameless.status_code == 400


@pytest.mark.parametrize(
    ("task", "body", "name"),
    [
        ("embedding", {"inputs": {"source_sentence": "a", "sentences": ["b"]}, "dimensions": 4}, "dimensions"),
        ("text-classification", {"inputs": "a", "parameters": {"multi_label": True}}, "parameters.multi_label"),
        (
            "text-classification",
            {"inputs": "a", "parameters": {"candidate_labels": ["x"], "top_k": 1}},
            "parameters.top_k",
        ),
        ("token-classification", {"inputs": "a", "parameters": {"strategy": "simple"}}, "parameters.strategy"),
        (
            "fill-mask",
            {"inputs": "a", "parameters": {"tokenizer_kwargs": {"truncation": True}}},
            "parameters.tokenizer_kwargs",
        ),
        ("text-generation", {"inputs": "a", "parameters": {"frequency_penalty": 0.5}}, "parameters.frequency_penalty"),
        ("text-generation", {"inputs": "a", "top_k": 1}, "top_k"),
    ],
)
async def test_an_option_that_the_task_has_not_is_refused_by_name(task: str, body: Any, name: str) -> None:
    response = await refused(task, body)
    assert response.status_code == 422
    assert f"`{name}`: is not supported here" in response.json()["error"]


@pytest.mark.parametrize(
    ("task", "parameters"),
    [
        ("text-classification", {"multi_label": None, "hypothesis_template": None, "top_k": None}),
        ("text-classification", {"": None, "candidate_labels": ["a", "b"]}),
        (
            "text-generation",
            {"top_k": None, "min_p": None, "best_of": 1, "watermark": False, "frequency_penalty": 0.0, "grammar": None},
        ),
        ("summarization", {"clean_up_tokenization_spaces": False, "num_return_sequences": 1}),
    ],
)
async def test_what_changes_nothing_is_accepted(task: str, parameters: Any) -> None:
    await asked(task, {"inputs": "a", "parameters": parameters})
