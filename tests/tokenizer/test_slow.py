"""Tokenizers that come without a tokenizer.json, against transformers' AutoTokenizer."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from serve_app.errors import IncompleteModelError, InputTooLongError, InvalidInputError
from serve_app.tokenizer.deployment import encoder_of
from serve_app.tokenizer.encoder import Encoder
from serve_app.tokenizer.slow import SlowEncoder
from serve_app.types import Side, TokenizeRequest
from tests.tokenizer.kinds import LIMIT, sequences
from tests.tokenizer.sentencepieces import save_marian, save_t5
from tests.tokenizer.test_encoder import TEXTS, encode_one, expected

KINDS = {"t5": (save_t5, Encoder), "marian": (save_marian, SlowEncoder)}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    save, cls = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    save(folder, LIMIT)
    (folder / "config.json").write_text(json.dumps({"model_type": request.param}))
    assert not (folder / "tokenizer.json").exists()
    return folder, cls


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("marian")
    save_marian(folder, LIMIT)
    (folder / "config.json").write_text('{"model_type": "marian"}')
    return folder


@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_have_the_references_ids_whole_and_cut(kind: tuple[Path, Any], side: Side) -> None:
    folder, cls = kind
    encoder, reference = encoder_of(folder, LIMIT), AutoTokenizer.from_pretrained(str(folder))
    assert isinstance(encoder, cls)
    for text in (*TEXTS.values(), "", ">>fra<< the model reads ☕"):
        batch = encode_one(encoder, text, side=side)  # type: ignore[arg-type]
        assert sequences(batch) == expected(reference, [text], side)
        assert batch.truncated.tolist() == [len(reference(text)["input_ids"]) > LIMIT]


def test_a_text_that_is_too_long_is_refused_with_its_tokens_and_alone(marian: Path) -> None:
    encoder, reference = encoder_of(marian, LIMIT), AutoTokenizer.from_pretrained(str(marian))
    long = "the model reads " * 30
    requests = [TokenizeRequest((text,), "error") for text in ("the model", long, "small words", "lone \ud800")]
    batch = encoder.encode(requests)
    assert sorted(batch.failures) == [1, 3]
    assert isinstance(batch.failures[1], InputTooLongError)
    assert f"{len(reference(long)['input_ids'])} tokens" in batch.failures[1].message
    assert sequences(batch) == [reference(text)["input_ids"] for text in ("the model", "small words")]


def test_what_needs_a_fast_tokenizer_is_refused(marian: Path) -> None:
    encoder = encoder_of(marian, LIMIT)
    asked = [
        TokenizeRequest(("a",), "windows"),
        TokenizeRequest(("a",), "truncate", align=True),
        TokenizeRequest((("a", "b"),), "truncate"),
        TokenizeRequest(((1, 10**6),), "truncate"),
    ]
    assert {type(error) for error in encoder.encode(asked).failures.values()} == {InvalidInputError}
    assert len(encoder.encode(asked).failures) == len(asked)


def test_threads_that_share_a_slow_tokenizer_get_their_own_ids(marian: Path) -> None:
    encoder, reference = encoder_of(marian, LIMIT), AutoTokenizer.from_pretrained(str(marian))
    texts = [f"the model {'reads small ' * (i % 12)}words {i}" for i in range(200)]
    with ThreadPoolExecutor(4) as threads:
        batches = list(threads.map(lambda text: encode_one(encoder, text), texts))  # type: ignore[arg-type]
    assert [ids for batch in batches for ids in sequences(batch)] == expected(reference, texts)


def test_files_of_which_no_tokenizer_can_be_made_are_told_with_the_cause(tmp_path: Path) -> None:
    save_marian(tmp_path, LIMIT)
    (tmp_path / "config.json").write_text('{"model_type": "marian"}')
    (tmp_path / "source.spm").write_bytes(b"no model")
    with pytest.raises(IncompleteModelError, match=r"no tokenizer can be made from the model's files: \w+: .+"):
        encoder_of(tmp_path, LIMIT)
