"""What becomes of a text that is read in windows, task by task, against its windows answered one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from serve_app.errors import EmptyInputError, InvalidInputError
from serve_app.options import ClassificationOptions, RerankOptions, SparseEmbeddingOptions, ZeroShotOptions
from serve_app.outputs import Ranking
from serve_app.tasks.embedding import over_windows
from serve_app.tasks.registry import TASKS
from serve_app.types import Features, Request, TokenizeRequest
from tests.tasks.families import FAMILIES, LIMIT, TEXTS, Family, family, with_card

LONG = "Hugging Face Inc. was sent to New York, said they. The model reads one of its words. " * 6
STRIDE = 5


def ask(given: Family, task: str, inputs: Any, options: Any, **keys: Any) -> Any:
    keys = {"long_texts": "windows", "stride": STRIDE, **keys}
    return given.answer(Request("1", given.card.name, task, tuple(inputs), options, **keys))


def windows(given: Family, text: str, *pair: str) -> list[tuple[int, ...]]:
    """Token ids of the windows, by the tokenizer of transformers."""
    cut = "only_second" if pair else True
    encoded = given.tokenizer(
        text, *pair, truncation=cut, max_length=LIMIT, stride=STRIDE, return_overflowing_tokens=True
    )
    return [tuple(ids) for ids in encoded["input_ids"]]


@pytest.mark.parametrize("over", ["mean", "max"])
def test_a_label_has_the_mean_or_the_highest_of_its_windows_scores(over: Any) -> None:
    given = family("roberta", "AutoModelForSequenceClassification", labels=("bad", "fair", "good", "best"))
    options = ClassificationOptions(over_windows=over)
    each = ask(given, "text-classification", windows(given, LONG), options)
    scores = np.array([[{s.label: s.score for s in one}[label] for label in given.card.labels] for one in each])
    wanted = scores.mean(0) if over == "mean" else scores.max(0)
    short, got = ask(given, "text-classification", ["a", LONG], options)
    assert len(each) > 2
    assert [s.label for s in got] == [given.card.labels[i] for i in np.argsort(-wanted)]
    np.testing.assert_allclose([s.score for s in got], np.sort(wanted)[::-1], atol=1e-6)
    assert short == ask(given, "text-classification", ["a"], options)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_documents_score_is_the_sigmoid_of_the_pairs_logit(name: str) -> None:
    given = family(name, "AutoModelForSequenceClassification", labels=("LABEL_0",))
    documents = list(TEXTS.values())
    pipe = given.pipe("text-classification", truncation=True, max_length=LIMIT)
    wanted = [pipe({"text": "small words", "text_pair": text})["score"] for text in documents]
    logits = [pipe({"text": "small words", "text_pair": t}, function_to_apply="none")["score"] for t in documents]
    asked = ["small words", *documents]
    ranked = ask(given, "rerank", asked, RerankOptions(), long_texts="truncate")
    np.testing.assert_allclose(ranked.scores, wanted, atol=1e-5)
    raw = ask(given, "rerank", asked, RerankOptions(raw_scores=True), long_texts="truncate")
    np.testing.assert_allclose(raw.scores, logits, atol=1e-5)
    assert ranked.order == raw.order == tuple(np.argsort(-raw.scores, kind="stable"))


def test_documents_are_in_the_order_of_their_logits_where_the_sigmoid_makes_them_equal() -> None:
    given = family("bert", "AutoModelForSequenceClassification", labels=("LABEL_0",))
    logits = np.array([[18.0], [20.0], [19.0], [20.0], [-3.0]], np.float32)
    request = Request("1", "bert", "rerank", ("q", "a", "b", "c", "d", "e"), RerankOptions())
    batch = given.encoder.encode([TASKS["rerank"].prepare(request, given.card)])
    ranking = TASKS["rerank"].postprocess(request, given.card, Features(batch, logits), None)
    assert isinstance(ranking, Ranking)
    assert ranking.scores[:4].tolist() == [1.0] * 4
    assert ranking.order == (1, 3, 2, 0, 4)


@pytest.mark.parametrize(("activation", "wanted"), [("identity", 2.0), ("sigmoid", 0.880797), ("tanh", 0.964028)])
def test_scores_are_made_by_the_models_own_activation(activation: str, wanted: float) -> None:
    given = with_card(family("bert", "AutoModelForSequenceClassification", labels=("LABEL_0",)), activation=activation)
    request = Request("1", "bert", "rerank", ("q", "a"), RerankOptions())
    batch = given.encoder.encode([TASKS["rerank"].prepare(request, given.card)])
    ranking = TASKS["rerank"].postprocess(request, given.card, Features(batch, np.array([[2.0]], np.float32)), None)
    assert isinstance(ranking, Ranking)
    np.testing.assert_allclose(ranking.scores, [wanted], atol=1e-6)


def test_a_document_is_as_good_as_its_best_window() -> None:
    given = family("roberta", "AutoModelForSequenceClassification", labels=("LABEL_0",))
    options = ClassificationOptions(function="none")
    each = ask(given, "text-classification", windows(given, "small words", LONG), options)
    got = ask(given, "rerank", ["small words", "a", LONG], RerankOptions(raw_scores=True))
    assert len(each) > 2
    assert got.scores[1] == pytest.approx(max(one[0].score for one in each), abs=1e-5)


def test_a_rerank_needs_documents_texts_and_a_model_with_one_label() -> None:
    one = family("bert", "AutoModelForSequenceClassification", labels=("LABEL_0",))
    three = family("bert", "AutoModelForSequenceClassification", labels=("contradiction", "neutral", "entailment"))
    with pytest.raises(EmptyInputError, match="no documents"):
        ask(one, "rerank", ["small words"], RerankOptions())
    with pytest.raises(InvalidInputError, match=r"inputs\[1\]: task rerank takes a single text"):
        ask(one, "rerank", ["small words", (5, 6)], RerankOptions())
    with pytest.raises(InvalidInputError, match="3 labels"):
        ask(three, "rerank", ["small words", "a"], RerankOptions())


def test_a_label_is_entailed_as_by_the_window_that_entails_it_most() -> None:
    labels = ("contradiction", "neutral", "entailment")
    given = family("roberta", "AutoModelForSequenceClassification", labels=labels)
    hypotheses = {label: f"This example is {label}." for label in ("one", "small")}
    best, chance = {}, {}
    for label, hypothesis in hypotheses.items():
        encoded = given.tokenizer(
            LONG, hypothesis, truncation="only_first", max_length=LIMIT, stride=STRIDE, return_overflowing_tokens=True
        )
        options = ClassificationOptions(function="none")
        each = ask(given, "text-classification", [tuple(ids) for ids in encoded["input_ids"]], options)
        logits = [{score.label: score.score for score in one} for one in each]
        assert len(logits) > 2
        best[label] = max(one["entailment"] for one in logits)
        chance[label] = max(1 / (1 + np.exp(one["contradiction"] - one["entailment"])) for one in logits)
    total = sum(np.exp(logit) for logit in best.values())
    for multi_label, wanted in ((True, chance), (False, {x: np.exp(logit) / total for x, logit in best.items()})):
        (got,) = ask(given, "zero-shot-classification", [LONG], ZeroShotOptions(tuple(hypotheses), multi_label))
        assert {score.label: pytest.approx(score.score, abs=1e-5) for score in got} == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sparse_vector_is_the_largest_weight_of_each_entry(name: str) -> None:
    given = family(name, "AutoModelForMaskedLM")
    for text in (LONG, "a", ""):
        dense = np.zeros(given.model.config.vocab_size, np.float32)
        for ids in windows(given, text):
            for index, weight in given._rows(one_sequence(given, ids), "splade", None):
                dense[int(index)] = max(dense[int(index)], weight)
        (got,) = ask(given, "sparse-embedding", [text], SparseEmbeddingOptions())
        assert got.indices.tolist() == np.flatnonzero(dense).tolist()
        np.testing.assert_allclose(got.values, dense[got.indices], atol=1e-5)


def one_sequence(given: Family, ids: tuple[int, ...]) -> Any:
    return given.encoder.encode([TokenizeRequest((ids,), "error")])


def test_an_embedding_is_the_mean_of_its_windows_by_tokens() -> None:
    given = family("bert", "AutoModel")
    batch = given.encoder.encode([TokenizeRequest(("a", LONG, "the model"), "windows", stride=STRIDE)])
    rows = np.random.default_rng(0).standard_normal((batch.num_sequences, 8)).astype(np.float32)
    lengths = batch.lengths()
    got = over_windows(Features(batch, rows))
    np.testing.assert_allclose(got[0], rows[0], atol=1e-6)
    np.testing.assert_allclose(got[1], np.average(rows[1:-1], axis=0, weights=lengths[1:-1]), atol=1e-6)
    np.testing.assert_allclose(got[2], rows[-1], atol=1e-6)
    assert batch.num_sequences > 4
