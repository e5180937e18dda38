"""Long texts over HTTP: what is made of their windows, against windows of transformers' tokenizer, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.equality.matrix import TOGETHER, TOLERANCE, Models, ask, assert_same, configs, refusal
from tests.inprocess import served
from tests.tasks.families import FAMILIES, LIMIT, Family, family

NLI = ("contradiction", "neutral", "entailment")
STRIDE = 5
LONG = {
    "words": "Hugging Face Inc. was sent to New York, said they. The model reads one of its words. " * 6,
    "no space": "w" * 400 + "☕",
    "scripts": "مرحبا بالعالم שלום עולם\r\ne\u0301 n\u0303o \x00 " * 10,
    "fits": "one two",
}
TEXTS = list(LONG.values())
IN_WINDOWS: dict[str, Any] = {"long_texts": "windows", "stride": STRIDE}


@pytest.fixture(scope="module")
def models() -> Models:
    return {
        f"{name}-{kind}": family(name, auto_class, **config)
        for name in FAMILIES
        for kind, auto_class, config in (
            ("nli", "AutoModelForSequenceClassification", {"labels": NLI}),
            ("rerank", "AutoModelForSequenceClassification", {"labels": ("LABEL_0",)}),
            ("vectors", "AutoModel", {}),
            ("masks", "AutoModelForMaskedLM", {}),
        )
    }


@pytest.fixture(scope="module")
def url(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(configs(models), tmp_path_factory.mktemp("cache"), **TOGETHER) as base:
        yield f"{base}/models"


def outputs(given: Family, *texts: str, cut: Any = True) -> list[Any]:
    """The stock model's output for each window by itself, with its token ids."""
    encoded = given.tokenizer(*texts, truncation=cut, max_length=LIMIT, stride=STRIDE, return_overflowing_tokens=True)
    found = []
    for index, ids in enumerate(encoded["input_ids"]):
        inputs = {name: torch.tensor([encoded[name][index]]) for name in given.tokenizer.model_input_names}
        with torch.inference_mode():
            found.append((ids, given.model(**inputs)))
    return found


def logits(given: Family, *texts: str, cut: Any = True) -> npt.NDArray[np.float32]:
    """(windows, labels)."""
    return np.stack([out.logits[0].numpy() for _, out in outputs(given, *texts, cut=cut)])


def softmax(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def best_first(labels: Any, scores: Any) -> list[dict[str, Any]]:
    found = [{"label": label, "score": float(score)} for label, score in zip(labels, scores, strict=True)]
    return sorted(found, key=lambda each: -each["score"])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_label_has_the_mean_or_the_highest_score_of_the_windows(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-nli"]
    bodies = [{"inputs": TEXTS, "parameters": {**IN_WINDOWS, "over_windows": over}} for over in ("mean", "max")]
    scores = [softmax(logits(given, text)) for text in TEXTS]
    assert len(scores[0]) > 2
    mean, highest = ask(f"{url}/{name}-nli", bodies)
    assert_same(mean, [best_first(NLI, each.mean(0)) for each in scores])
    assert_same(highest, [best_first(NLI, each.max(0)) for each in scores])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_label_is_entailed_as_by_its_best_window(name: str, url: str, models: Models) -> None:
    given, labels = models[f"{name}-nli"], ["one", "small", "a long line"]
    chosen = {**IN_WINDOWS, "candidate_labels": labels}
    bodies = [{"inputs": TEXTS, "parameters": {**chosen, "multi_label": several}} for several in (False, True)]
    one, several = ask(f"{url}/{name}-nli", bodies)
    for index, text in enumerate(TEXTS):
        windows = [logits(given, text, f"This example is {label}.", cut="only_first") for label in labels]
        entailed = softmax(np.array([each[:, 2].max() for each in windows]))
        assert_same(one[index], best_first(labels, entailed))
        chances = [softmax(each[:, [0, 2]])[:, 1].max() for each in windows]
        assert_same(several[index], best_first(labels, chances))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_document_is_as_good_as_its_best_window(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-rerank"]
    compared = {"source_sentence": "small words", "sentences": TEXTS}
    [got] = ask(f"{url}/{name}-rerank", [{"inputs": compared, "parameters": {**IN_WINDOWS, "raw_scores": True}}])
    assert_same(got, [logits(given, "small words", text, cut="only_second").max() for text in TEXTS])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vector_is_the_windows_mean_by_their_tokens(name: str, url: str, models: Models) -> None:
    given, wanted = models[f"{name}-vectors"], []
    for text in TEXTS:
        rows = [(len(ids), out.last_hidden_state[0].mean(0).numpy()) for ids, out in outputs(given, text)]
        wanted.append(np.average([row for _, row in rows], axis=0, weights=[tokens for tokens, _ in rows]))
    [got] = ask(f"{url}/{name}-vectors", [{"inputs": TEXTS, "parameters": IN_WINDOWS}])
    np.testing.assert_allclose(got, np.stack(wanted), atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sparse_vector_has_the_largest_weight_of_the_windows(name: str, url: str, models: Models) -> None:
    given, wanted = models[f"{name}-masks"], []
    for text in TEXTS:
        weights = torch.stack([out.logits[0].relu().log1p().amax(0) for _, out in outputs(given, text)]).amax(0)
        wanted.append([{"index": i, "value": float(weights[i])} for i in weights.nonzero().ravel().tolist()])
    [got] = ask(f"{url}/{name}-masks/embed_sparse", [{"inputs": TEXTS, **IN_WINDOWS}])
    assert_same(got, wanted)


def stitched(given: Family, text: str) -> list[tuple[int, int]]:
    """The window and the place in it of each token of the whole text: the first half of what two windows share is
    taken from the first of them.
    """
    windows = outputs(given, text)
    before = given.tokenizer("", return_special_tokens_mask=True)["special_tokens_mask"].index(1) + 1
    found: list[tuple[int, int]] = []
    for index, (ids, _) in enumerate(windows):
        first = 0 if index == 0 else before + STRIDE // 2
        last = len(ids) if index == len(windows) - 1 else len(ids) - 1 - (STRIDE - STRIDE // 2)
        found += [(index, place) for place in range(first, last)]
    assert len(found) == len(given.tokenizer(text)["input_ids"])
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_each_token_has_the_vector_of_the_window_with_more_around_it(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-vectors"]
    [got] = ask(f"{url}/{name}-vectors/embed_all", [{"inputs": TEXTS, **IN_WINDOWS}])
    for vectors, text in zip(got, TEXTS, strict=True):
        windows = [out.last_hidden_state[0].numpy() for _, out in outputs(given, text)]
        wanted = np.stack([windows[window][place] for window, place in stitched(given, text)])
        np.testing.assert_allclose(vectors, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_mask_is_filled_once_by_the_window_with_more_around_it(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-masks"]
    mask = given.tokenizer.mask_token
    text = " ".join(f"the model {mask} reads" if i % 5 == 0 else "the words" for i in range(60))
    [got] = ask(f"{url}/{name}-masks", [{"inputs": text, "parameters": {**IN_WINDOWS, "top_k": 2}}])
    assert_same(got, fills(given, text))


def fills(given: Family, text: str) -> list[list[dict[str, Any]]]:
    whole = given.tokenizer(text)["input_ids"]
    windows = [out.logits[0].softmax(-1) for _, out in outputs(given, text)]
    found = []
    for index, (window, place) in enumerate(stitched(given, text)):
        if whole[index] == given.tokenizer.mask_token_id:
            chances, tokens = windows[window][place].topk(2)
            found.append([_fill(given, whole, index, *each) for each in zip(chances, tokens.tolist(), strict=True)])
    return found


def _fill(given: Family, whole: list[int], index: int, chance: torch.Tensor, token: int) -> dict[str, Any]:
    filled = [*whole[:index], token, *whole[index + 1 :]]
    return {
        "score": float(chance),
        "token": token,
        "token_str": given.tokenizer.decode([token]),
        "sequence": given.tokenizer.decode(filled),
    }


def test_the_answer_tells_how_many_windows_there_were_and_what_was_cut(url: str, models: Models) -> None:
    here = f"{url}/bert-vectors"
    windows = [len(outputs(models["bert-vectors"], text)) for text in TEXTS]
    several = [count for count in windows if count > 1]
    told = httpx.post(here, json={"inputs": TEXTS, "parameters": IN_WINDOWS}, timeout=60).headers
    assert (told["x-windows"], told["x-truncated-inputs"]) == (str(sum(several)), "0")
    told = httpx.post(here, json={"inputs": TEXTS}, timeout=60).headers
    assert (told["x-windows"], told["x-truncated-inputs"]) == ("0", str(len(several)))


def test_a_text_of_a_megabyte_is_cut_or_refused_in_windows(url: str) -> None:
    text = "the words " * 99_000
    for name in ("bert-nli", "roberta-nli"):
        whole, cut = ask(f"{url}/{name}", [{"inputs": [text]}, {"inputs": [text[:2000]]}])
        assert_same(whole, cut)
    status, why = refusal(f"{url}/bert-nli", {"inputs": text, "parameters": IN_WINDOWS})
    assert status == 422
    assert str(TOGETHER["max_windows"]) in why
