"""Models as sentence-transformers saves them, over HTTP, against sentence-transformers that loads the same folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast, XLNetTokenizer

from serve_app.config import ModelConfig
from tests.equality.matrix import TOGETHER, TOLERANCE, ask, assert_same
from tests.inprocess import served
from tests.model.tiny import tiny_model
from tests.tasks.families import family
from tests.tokenizer.kinds import TYPED, byte_level, xlm_roberta

QUERY = "Small WORDS"
DOCUMENTS = ["The model reads a long line.", "One vector", "it's É small", "a", "the words " * 60, "☕", "New York"]
LIMIT = 48

Maker = Callable[[Path], None]


def reranker(folder: Path, name: str = "bert", **options: Any) -> None:
    """Saved by this version: with modules.json."""
    bare = family(name, "AutoModelForSequenceClassification", labels=("LABEL_0",)).folder
    CrossEncoder(str(bare), device="cpu", **options).save_pretrained(str(folder))


def older_reranker(folder: Path, **config: Any) -> None:
    """As versions before 5.4 saved it: without modules.json, the activation in config.json."""
    bare = family("bert", "AutoModelForSequenceClassification", labels=("LABEL_0",)).folder
    shutil.copytree(bare, folder)
    edit(folder / "config.json", **config)


def edit(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


IDENTITY = "torch.nn.modules.linear.Identity"

RERANKERS: Mapping[str, Maker] = {
    "as-it-is": reranker,
    "roberta": lambda folder: reranker(folder, "roberta", activation_fn=torch.nn.Identity()),
    "albert": lambda folder: reranker(folder, "albert", activation_fn=torch.nn.Identity()),
    "identity": lambda folder: reranker(folder, activation_fn=torch.nn.Identity()),
    "tanh": lambda folder: reranker(folder, activation_fn=torch.nn.Tanh()),
    "prompted": lambda folder: reranker(folder, prompts={"query": "the model: "}, default_prompt_name="query"),
    "version-4": lambda folder: older_reranker(folder, sentence_transformers={"activation_fn": IDENTITY}),
    "version-3": lambda folder: older_reranker(folder, sbert_ce_default_activation_function=IDENTITY),
    "plain": older_reranker,
}


def embedder(folder: Path, bare: Path, pooling: str = "mean", normalize: bool = False, **options: Any) -> None:
    transformer = Transformer(str(bare))
    chain = [transformer, Pooling(transformer.get_embedding_dimension(), pooling)]
    SentenceTransformer(modules=[*chain, Normalize()] if normalize else chain, device="cpu", **options).save_pretrained(
        str(folder)
    )


def encoder(name: str) -> Path:
    return family(name, "AutoModel").folder


def lower_cased(folder: Path) -> None:
    embedder(folder, encoder("distilbert"))
    edit(folder / "sentence_bert_config.json", do_lower_case=True)


def ending(folder: Path) -> None:
    """A decoder of which the last token is pooled; its files ask for an end token that tokenizer.json does not add."""
    bare = folder.with_name("llama-bare")
    words = byte_level()
    words.post_processor = None
    size = words.get_vocab_size()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    ).save_pretrained(bare)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=size, max_position_embeddings=64, pad_token_id=words.token_to_id("<pad>"), **sizes)
    LlamaModel(config).save_pretrained(bare)
    edit(bare / "tokenizer_config.json", add_eos_token=True, tokenizer_class="LlamaTokenizer")
    embedder(folder, bare, "lasttoken")
    edit(folder / "tokenizer_config.json", add_eos_token=True)


def typed_alone(folder: Path) -> None:
    """XLNet gives the last token of a single text a type of its own."""
    bare = folder.with_name("xlnet-bare")
    pieces = [tuple(piece) for piece in json.loads(xlm_roberta().to_str())["model"]["vocab"]]
    words = XLNetTokenizer(vocab=[*pieces, ("<sep>", 0.0), ("<cls>", 0.0)], model_input_names=list(TYPED))
    words.save_pretrained(bare)
    tiny_model("xlnet", vocab_size=len(words)).save_pretrained(bare)
    embedder(folder, bare)


EMBEDDERS: Mapping[str, Maker] = {
    "mean": lambda folder: embedder(folder, encoder("bert"), normalize=True),
    "cls": lambda folder: embedder(folder, encoder("xlm-roberta"), "cls"),
    "prompted-text": lambda folder: embedder(
        folder, encoder("roberta"), prompts={"query": "the model: "}, default_prompt_name="query"
    ),
    "lower-cased": lower_cased,
    "ending": ending,
    "typed-alone": typed_alone,
}


def sparse(folder: Path) -> None:
    SparseEncoder(str(family("bert", "AutoModelForMaskedLM").folder), device="cpu").save_pretrained(str(folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, make in {**RERANKERS, **EMBEDDERS, "sparse": sparse}.items():
        make(root / name)
    return root


@pytest.fixture(scope="module")
def url(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    names = (*RERANKERS, *EMBEDDERS, "sparse")
    configs = [ModelConfig(name=name, source=str(models / name), max_input_tokens=LIMIT) for name in names]
    with served(configs, tmp_path_factory.mktemp("cache"), **TOGETHER) as base:
        yield f"{base}/models"


@pytest.mark.parametrize("name", RERANKERS)
def test_documents_are_ranked_as_by_the_cross_encoder(name: str, url: str, models: Path) -> None:
    wanted = CrossEncoder(str(models / name), device="cpu", max_length=LIMIT).rank(QUERY, DOCUMENTS)
    [ranked] = ask(f"{url}/{name}/rerank", [{"query": QUERY, "texts": DOCUMENTS, "truncate": True}])
    assert_same(ranked, [{"index": each["corpus_id"], "score": each["score"]} for each in wanted])
    [best] = ask(f"{url}/{name}/v1/rerank", [{"model": name, "query": QUERY, "documents": DOCUMENTS, "top_n": 3}])
    assert_same(
        [(each["index"], each["relevance_score"]) for each in best["results"]],
        [(each["corpus_id"], each["score"]) for each in wanted[:3]],
    )


def test_each_activation_makes_other_scores(url: str) -> None:
    """So that a wrong one shows."""
    body = {"query": QUERY, "texts": DOCUMENTS, "truncate": True}
    scores = [ask(f"{url}/{name}/rerank", [body])[0][0]["score"] for name in ("as-it-is", "identity", "tanh")]
    assert min(abs(one - other) for one, other in zip(scores, scores[1:] + scores[:1], strict=True)) > 1e-2


@pytest.mark.parametrize("name", EMBEDDERS)
def test_vectors_are_those_of_the_sentence_transformer(name: str, url: str, models: Path) -> None:
    reference = SentenceTransformer(str(models / name), device="cpu")
    reference.max_seq_length = LIMIT
    wanted = reference.encode(DOCUMENTS)
    [got] = ask(f"{url}/{name}", [{"inputs": DOCUMENTS, "truncate": True}])
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE)
    alone = ask(f"{url}/{name}", [{"inputs": text, "truncate": True} for text in DOCUMENTS])
    np.testing.assert_allclose([each[0] for each in alone], wanted, atol=TOLERANCE)


def test_sparse_vectors_are_those_of_the_sparse_encoder(url: str, models: Path) -> None:
    reference = SparseEncoder(str(models / "sparse"), device="cpu")
    reference.max_seq_length = LIMIT
    wanted = reference.encode(DOCUMENTS).to_dense().numpy()
    got = np.zeros_like(wanted)
    for row, found in enumerate(ask(f"{url}/sparse/embed_sparse", [{"inputs": DOCUMENTS, "truncate": True}])[0]):
        for each in found:
            got[row, each["index"]] = each["value"]
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE)
