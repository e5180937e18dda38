"""Text generation and texts of texts at the root: their parameters, and what becomes of those that are not known."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import GenerationConfig

from serve_app import options
from serve_app.ingress.protocols import generation
from tests.ingress.edge import FakeService, client_of
from tests.ingress.test_protocols_huggingface_tasks import asked, refused

SEQ2SEQ = ("text2text-generation", "summarization", "translation")
CANARY = "a-name-that-must-not-come-back"


async def test_truncate_is_a_number_of_tokens_counted_from_the_end() -> None:
    for task in ("text-generation", *SEQ2SEQ):
        _, request = await asked(task, {"inputs": "a", "parameters": {"truncate": 5}})
        assert isinstance(request.options, options.GenerationOptions)
        assert (request.options.prompt_tokens, request.long_texts, request.truncation_side) == (5, "truncate", "left")


async def test_truncate_is_yes_or_no_as_well() -> None:
    for told, long_texts in ((True, "truncate"), (False, "error"), (None, None)):
        _, request = await asked("text-generation", {"inputs": "a", "parameters": {"truncate": told}})
        assert (request.options, request.long_texts) == (options.GenerationOptions(), long_texts)


@pytest.mark.parametrize("truncate", [0, -1, 2.5, "5", [5]], ids=repr)
async def test_a_number_of_tokens_is_above_0(truncate: Any) -> None:
    response = await refused("text-generation", {"inputs": "a", "parameters": {"truncate": truncate}})
    assert response.status_code == 400
    assert "truncate" in response.json()["error"]


@pytest.mark.parametrize("nested", [True, False])
async def test_everything_that_generation_supports_is_taken(nested: bool) -> None:
    chosen = {
        "max_length": 30,
        "min_length": 4,
        "do_sample": True,
        "typical_p": 0.9,
        "min_p": 0.1,
        "epsilon_cutoff": 0.0003,
        "eta_cutoff": 0.0004,
        "renormalize_logits": True,
        "encoder_repetition_penalty": 1.5,
        "no_repeat_ngram_size": 3,
        "encoder_no_repeat_ngram_size": 2,
        "num_beams": 4,
        "length_penalty": 2.0,
        "early_stopping": "never",
    }
    parameters = {"generate_parameters": chosen} if nested else chosen
    _, request = await asked("summarization", {"inputs": "a", "parameters": parameters})
    assert request.options == options.GenerationOptions(**chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", SEQ2SEQ)
@pytest.mark.parametrize("nested", [True, False])
async def test_what_generation_does_not_support_is_refused_by_name(task: str, nested: bool) -> None:
    chosen = {"num_return_sequences": 3, "max_new_tokens": 5}
    response = await refused(task, {"inputs": "a", "parameters": {"generate_parameters": chosen} if nested else chosen})
    assert response.status_code == 422
    for told in ("num_return_sequences", "max_new_tokens", "parameters.generate" if nested else "parameters"):
        assert told in response.json()["error"]


async def test_a_name_that_generate_does_not_know_is_refused_and_not_repeated() -> None:
    response = await refused("summarization", {"inputs": "a", "parameters": {CANARY: CANARY}})
    assert response.status_code == 422
    assert CANARY not in response.text
    assert "not known" in response.json()["error"]


async def test_values_that_change_nothing_are_taken() -> None:
    neutral = {"num_return_sequences": 1, "use_cache": True, "diversity_penalty": 0.0, "bad_words_ids": None}
    _, request = await asked("translation", {"inputs": "a", "parameters": {"generate_parameters": neutral}})
    assert request.options == options.GenerationOptions()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("task", ["text-generation", *SEQ2SEQ])
async def test_every_name_of_generates_own_is_supported_or_refused_by_name(task: str, nested: bool) -> None:
    hidden = {"transformers_version", "_from_model_config", *generation.GenerateFields.model_fields}
    for name in sorted(set(GenerationConfig().to_dict()) - hidden - {"stop_strings"}):
        asked_for = {name: "what it never is"}
        seq2seq = nested and task != "text-generation"
        response = await refused(
            task, {"inputs": "a", "parameters": {"generate_parameters": asked_for} if seq2seq else asked_for}
        )
        assert response.status_code == 422
        assert f"{name}`: is not supported" in response.json()["error"]


@pytest.mark.parametrize(
    ("task", "key"), [*zip(SEQ2SEQ, ("generated_text", "summary_text", "translation_text"), strict=True)]
)
async def test_texts_of_texts_have_details_too(task: str, key: str) -> None:
    (answer,), request = await asked(task, {"inputs": "a", "parameters": {"details": True}})
    assert isinstance(request.options, options.GenerationOptions)
    assert request.options.logprobs == 0
    assert (answer[key], answer["details"]["generated_tokens"]) == ("Once upon a time", 4)
    assert [token["id"] for token in answer["details"]["tokens"]] == [10, 11, 12, 13]


@pytest.mark.parametrize("task", SEQ2SEQ)
@pytest.mark.parametrize("details", [True, False])
async def test_texts_of_texts_are_streamed_too(task: str, details: bool) -> None:
    """Without details the log probabilities are null: a model that searches with beams has none."""
    async with client_of(FakeService(task=task)) as client:
        response = await client.post("/", json={"inputs": "a", "stream": True, "parameters": {"details": details}})
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line]
    assert "".join(event["token"]["text"] for event in events) == events[-1]["generated_text"] == "Once upon a time"
    assert (events[1]["token"]["logprob"] is None) == (not details)
    assert events[-1]["details"]["input_length"] == 6
