"""Folders of tokenizers: the real one of all-MiniLM-L6-v2, and small ones of other kinds; each with its encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from serve_app.tokenizer.encoder import Encoder
from tests.reference import MINILM, minilm_folder
from tests.tokenizer.kinds import KINDS, LIMIT, TYPED, save


@pytest.fixture(scope="session", params=[MINILM, *KINDS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == MINILM:
        return minilm_folder()
    return save(KINDS[request.param](), tmp_path_factory.mktemp(request.param), model_input_names=list(TYPED))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder(folder, LIMIT)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer
