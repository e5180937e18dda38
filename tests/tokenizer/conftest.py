"""Folders of tokenizers: the real one of all-MiniLM-L6-v2, and small ones of other kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reference import MINILM, minilm_folder
from tests.tokenizer.kinds import KINDS, save


@pytest.fixture(scope="session", params=[MINILM, *KINDS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == MINILM:
        return minilm_folder()
    return save(KINDS[request.param](), tmp_path_factory.mktemp(request.param))
