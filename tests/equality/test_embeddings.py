"""Embeddings of sentences and of tokens, sparse ones and similarities over HTTP, against the stock models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from serve_app.config import ModelConfig
from tests.equality.matrix import TOGETHER, TOLERANCE, Models, ask, assert_same, attentions, configs, refusal, texts_of
from tests.inprocess import served
from tests.reference import minilm_folder
from tests.tasks.families import FAMILIES, LIMIT, Family, family

POOLINGS: tuple[Literal["mean", "cls", "lasttoken"], ...] = ("mean", "cls", "lasttoken")
PROMPTS = {"query": "the model reads: ", "passage": ""}


@pytest.fixture(scope="module")
def models() -> Models:
    kinds = (("vectors", "AutoModel"), ("sparse", "AutoModelForMaskedLM"))
    return {f"{name}-{kind}": family(name, auto_class) for name in FAMILIES for kind, auto_class in kinds}


@pytest.fixture(scope="module")
def url(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    sparse = configs(
        {name: given for name, given in models.items() if name.endswith("sparse")}, task="sparse-embedding"
    )
    vectors = {name: given for name, given in models.items() if name.endswith("vectors")}
    pooled = [
        config
        for pooling in POOLINGS
        for config in configs(
            {f"{name}-{pooling}": given for name, given in vectors.items()}, pooling=pooling, prompts=PROMPTS
        )
    ]
    minilm = ModelConfig(name="minilm", source=str(minilm_folder()))
    with served([*sparse, *pooled, minilm], tmp_path_factory.mktemp("cache"), **TOGETHER) as base:
        yield f"{base}/models"


def token_vectors(given: Family, text: str, **keys: Any) -> npt.NDArray[np.float32]:
    """(tokens, h) by transformers alone."""
    encoded = given.tokenizer(text, truncation=True, max_length=LIMIT, return_tensors="pt", **keys)
    with torch.inference_mode():
        hidden: npt.NDArray[np.float32] = given.model(**encoded).last_hidden_state[0].numpy()
    return hidden


def pooled(given: Family, texts: Sequence[str], pooling: str) -> npt.NDArray[np.float32]:
    tokens = [token_vectors(given, text) for text in texts]
    choose = {"mean": lambda rows: rows.mean(0), "cls": lambda rows: rows[0], "lasttoken": lambda rows: rows[-1]}
    return np.stack([choose[pooling](rows) for rows in tokens])


def unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vector_is_the_models_own_pooled(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-vectors"]
    texts = texts_of(given)
    for pooling in POOLINGS:
        wanted = pooled(given, texts, pooling)
        prompted = pooled(given, [PROMPTS["query"] + text for text in texts], pooling)
        plain, normal, short, query = ask(
            f"{url}/{name}-vectors-{pooling}",
            [
                {"inputs": texts},
                {"inputs": texts, "normalize": True},
                {"inputs": texts, "parameters": {"dimensions": 20, "normalize": True}},
                {"inputs": texts, "prompt_name": "query"},
            ],
        )
        np.testing.assert_allclose(plain, wanted, atol=TOLERANCE)
        np.testing.assert_allclose(normal, unit(wanted), atol=TOLERANCE)
        np.testing.assert_allclose(short, unit(wanted[:, :20]), atol=TOLERANCE)
        np.testing.assert_allclose(query, prompted, atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_beginning_is_cut_where_that_is_asked_for(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-vectors"]
    texts = ["The model reads small words, they've said. " * 20, "w" * 10_000]
    given.tokenizer.truncation_side = "left"
    try:
        wanted = pooled(given, texts, "mean")
    finally:
        given.tokenizer.truncation_side = "right"
    body = {"inputs": texts, "truncate": True, "truncation_direction": "left"}
    np.testing.assert_allclose(ask(f"{url}/{name}-vectors-mean", [body])[0], wanted, atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_of_tokens_are_the_pipelines(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-vectors"]
    texts = texts_of(given)
    pipe = given.pipe("feature-extraction", tokenize_kwargs={"truncation": True, "max_length": LIMIT})
    bodies = [{"inputs": texts, "truncate": True}, *({"inputs": text} for text in texts)]
    together, *alone = ask(f"{url}/{name}-vectors-cls/embed_all", bodies)
    for vectors, [own], wanted in zip(together, alone, pipe(texts), strict=True):
        np.testing.assert_allclose(vectors, wanted[0], atol=TOLERANCE)
        np.testing.assert_allclose(own, wanted[0], atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_similarities_are_cosines_with_the_first_sentence(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-vectors"]
    texts = texts_of(given)
    vectors = unit(pooled(given, ["small words", *texts], "mean"))
    [got] = ask(f"{url}/{name}-vectors-mean", [{"inputs": {"source_sentence": "small words", "sentences": texts}}])
    np.testing.assert_allclose(got, vectors[1:] @ vectors[0], atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sparse_vector_is_the_splade_rule(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-sparse"]
    texts = texts_of(given)
    wanted = [splade(given, text) for text in texts]
    here = f"{url}/{name}-sparse"
    assert_same(ask(here, [{"inputs": texts}])[0], wanted)
    assert_same(ask(f"{here}/embed_sparse", [{"inputs": texts, "truncate": True}])[0], wanted)
    assert_same(ask(here, [{"inputs": text} for text in texts]), [[vector] for vector in wanted])


def splade(given: Family, text: str) -> list[dict[str, Any]]:
    """log(1 + relu(logits)), the largest over the tokens (https://arxiv.org/abs/2109.10086)."""
    encoded = given.tokenizer(text, truncation=True, max_length=LIMIT, return_tensors="pt")
    with torch.inference_mode():
        weights = torch.log1p(torch.relu(given.model(**encoded).logits[0])).amax(0)
    return [{"index": i, "value": float(weights[i])} for i in weights.nonzero().ravel().tolist()]


def test_minilms_vectors_are_those_of_sentence_transformers(url: str) -> None:
    from sentence_transformers import SentenceTransformer

    texts = [
        "What is Deep Learning?",
        "naïve café ☕ 你好 e\u0301",
        "مرحبا بالعالم שלום עולם",
        "nul\x00byte\r\nline",
        "a",
        "",
        "w" * 10_000,
        "A replica that was lost is made anew. " * 60,
        *("the" + ", the" * count for count in (126, 127)),
    ]
    wanted = SentenceTransformer(str(minilm_folder()), device="cpu").encode(texts)
    here = f"{url}/minilm"
    together, *alone = ask(here, [{"inputs": texts}, *({"inputs": text} for text in texts)])
    np.testing.assert_allclose(together, wanted, atol=TOLERANCE)
    np.testing.assert_allclose([each[0] for each in alone], wanted, atol=TOLERANCE)
    [openai] = ask(f"{here}/v1/embeddings", [{"input": texts, "model": "minilm"}])
    np.testing.assert_allclose([each["embedding"] for each in openai["data"]], wanted, atol=TOLERANCE)


def test_every_model_is_computed_packed(url: str) -> None:
    assert attentions(url) == {"packed"}


@pytest.mark.parametrize("path", ["bert-vectors-mean", "bert-vectors-mean/embed_all", "bert-sparse"])
def test_what_may_not_be_cut_is_refused_with_the_reason(path: str, url: str, models: Models) -> None:
    fits, too_long = texts_of(models["bert-vectors"])[-2:]
    uncut: dict[str, Any] = {"truncate": False} | ({} if "/" in path else {"parameters": {"truncate": False}})
    assert len(ask(f"{url}/{path}", [{"inputs": [fits], **uncut}])[0]) == 1
    status, why = refusal(f"{url}/{path}", {"inputs": [fits, too_long], **uncut})
    assert status == 422
    assert f"inputs[1]: {LIMIT + 1} tokens, and the model takes {LIMIT}" in why
