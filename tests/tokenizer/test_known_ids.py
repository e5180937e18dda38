"""Tokens that the tokenizer has and the model has not: refused where the model itself would fail, and nowhere else."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from serve_app.errors import InvalidInputError
from serve_app.ingress.words import whole_texts
from serve_app.tokenizer.deployment import encoder_of
from serve_app.tokenizer.encoder import Encoder
from serve_app.types import Chat, ChatMessage, TextInput, TokenizeRequest
from tests.tokenizer.kinds import qwen, sequences, wordpiece
from tests.tokenizer.sentencepieces import save_marian

LIMIT = 24
NEW = ("<|im_start|>", "<|im_end|>")
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"""


def save(folder: Path, *new: str, template: str | None = None) -> Path:
    """A model that knows every token of its tokenizer but `new`, as where `resize_token_embeddings` was forgotten."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=qwen(), chat_template=template)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=400, **sizes)).save_pretrained(folder)
    tokenizer.add_tokens(list(new), special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), *NEW, template=TEMPLATE)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder(folder, LIMIT)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def fails_in(model: Any, ids: list[int]) -> bool:
    try:
        model(torch.tensor([ids]))
    except IndexError:
        return True
    return False


LONG = "the model reads small words " * 10
TEXTS: dict[str, tuple[TextInput, ...]] = {
    "one of its tokens": ("small words <|im_start|>",),
    "none of them": ("small words", "the model"),
    "one in the second text": ("small words", "a <|im_end|> b"),
    "one that is cut off": (LONG + "<|im_start|>",),
    "one that is left of a cut text": ("<|im_start|>" + LONG,),
    "a pair with one": (("the model", "words <|im_end|>"),),
    "a pair without": (("the model", "words"),),
    "a long pair that loses it": (("the model", LONG + "<|im_end|>"),),
}


@pytest.mark.parametrize("inputs", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("align", [False, True], ids=["plain", "with places"])
def test_a_request_is_refused_where_the_model_would_fail_and_its_neighbours_are_not(
    encoder: Encoder, model: Any, reference: Any, inputs: tuple[TextInput, ...], align: bool
) -> None:
    wanted = [
        reference(*(value if isinstance(value, tuple) else (value,)), truncation=True, max_length=LIMIT)["input_ids"]
        for value in inputs
    ]
    neighbour = TokenizeRequest(("one vector",), "truncate")
    request = TokenizeRequest(inputs, "truncate", align=align)
    batch = encoder.encode([neighbour, request, neighbour])
    fails = any(fails_in(model, ids) for ids in wanted)
    assert sorted(batch.failures) == ([1] if fails else [])
    beside = reference("one vector")["input_ids"]
    assert sequences(batch) == [beside, *([] if fails else wanted), beside]


def test_the_refusal_names_the_input_the_token_and_what_to_do(encoder: Encoder, reference: Any) -> None:
    batch = encoder.encode([TokenizeRequest(("small words", "<|im_end|>"), "truncate")])
    refusal = batch.failures[0]
    assert isinstance(refusal, InvalidInputError)
    assert "inputs[1]" in refusal.message
    assert f"{reference.convert_tokens_to_ids('<|im_end|>')} (<|im_end|>)" in refusal.message
    assert "resize_token_embeddings" in refusal.message


def test_each_window_counts(encoder: Encoder) -> None:
    asked = [TokenizeRequest((text,), "windows") for text in (LONG + "<|im_start|> a", LONG)]
    batch = encoder.encode(asked)
    assert list(batch.failures) == [0]
    assert "inputs[0]" in batch.failures[0].message
    assert len(sequences(batch)) > 2


def test_a_prompt_counts(encoder: Encoder) -> None:
    asked = TokenizeRequest(("small words",), "truncate", prompt="<|im_start|>")
    batch = encoder.encode([asked, replace(asked, prompt="query: ")])
    assert list(batch.failures) == [0]


@pytest.mark.parametrize("long_texts", ["truncate", "windows"])
def test_token_ids_of_a_client_count(encoder: Encoder, model: Any, long_texts: Any) -> None:
    known = model.get_input_embeddings().weight.shape[0]
    asked = [TokenizeRequest(((5, token),), long_texts) for token in (known - 1, known, known + 1, known + 2)]
    failures = encoder.encode(asked).failures
    assert sorted(failures) == [1, 2, 3]
    assert [f"({token})" in failures[i].message for i, token in enumerate(NEW, 1)] == [True, True]
    assert f"0 to {known + 1}" in failures[3].message, "the tokenizer has no such token either"


def test_a_conversation_counts_with_what_the_template_adds(encoder: Encoder, tmp_path: Path) -> None:
    talk = TokenizeRequest((Chat((ChatMessage("user", "small words"),)),), "error")
    batch = encoder.encode([talk, TokenizeRequest(("small words",), "error")])
    assert list(batch.failures) == [0]
    assert "<|im_start|>" in batch.failures[0].message
    assert "chat template" in batch.failures[0].message
    plain = Encoder(save(tmp_path, *NEW, template="{{ messages[0]['content'] }}"), LIMIT)
    assert not plain.encode([talk]).failures


def test_what_is_only_tokenized_may_have_them(encoder: Encoder, reference: Any) -> None:
    batch = encoder.encode([whole_texts(["a <|im_start|> b"])])
    assert sequences(batch) == [reference("a <|im_start|> b")["input_ids"]]


def test_the_tokens_are_named_when_the_tokenizer_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Encoder(save(tmp_path / "some", *(f"<new{i}>" for i in range(12))), LIMIT)
    (record,) = caplog.records
    told = record.getMessage()
    assert "12 tokens" in told
    assert "'<new0>', " in told
    assert "'<new9>', ..." in told
    assert "<new10>" not in told
    caplog.clear()
    Encoder(save(tmp_path / "none"), LIMIT)
    assert not caplog.records


def test_a_tokenizer_whose_own_special_tokens_are_unknown_refuses_everything(tmp_path: Path) -> None:
    """As where the folder has the tokenizer of another model."""
    PreTrainedTokenizerFast(tokenizer_object=wordpiece()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 3}))
    batch = Encoder(tmp_path, LIMIT).encode([TokenizeRequest(("hello",), "truncate")])
    assert isinstance(batch.failures[0], InvalidInputError)


def test_a_slow_tokenizer_refuses_them_too(tmp_path: Path) -> None:
    save_marian(tmp_path, LIMIT)
    (tmp_path / "config.json").write_text('{"model_type": "marian"}')
    reference = AutoTokenizer.from_pretrained(str(tmp_path))
    text, language = "the model", ">>fra<< the model"
    known = max(reference(text)["input_ids"]) + 1
    assert max(reference(language)["input_ids"]) >= known, "the languages' tokens are the last ones"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "marian", "vocab_size": known}))
    encoder = encoder_of(tmp_path, LIMIT)
    batch = encoder.encode([TokenizeRequest((each,), "truncate") for each in (text, language, text)])
    assert list(batch.failures) == [1]
    assert ">>fra<<" in batch.failures[1].message
    assert sequences(batch) == [reference(text)["input_ids"]] * 2


def test_a_model_whose_files_do_not_tell_its_size_is_given_every_token(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=qwen())
    tokenizer.add_tokens(list(NEW), special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    asked = TokenizeRequest(("small words <|im_start|>",), "truncate")
    assert not Encoder(tmp_path, LIMIT).encode([asked]).failures
