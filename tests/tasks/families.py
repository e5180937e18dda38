"""Tiny random models of several families with real tokenizers, saved as folders, and their stock logits as features."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer, pipeline

from serve_app.config import ModelConfig
from serve_app.outputs import TaskOutput
from serve_app.tasks.card import read_card
from serve_app.tasks.registry import TASKS
from serve_app.tasks.stock_tokenizer import read_stock_tokenizer
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.tokenizer.encoder import Encoder
from serve_app.types import Features, FloatArray, MaskArguments, ModelCard, Request, TokenBatch
from tests.tokenizer import kinds

LIMIT = 48

FAMILIES = ("bert", "distilbert", "roberta", "albert", "xlm-roberta")

_TOKENIZERS = {
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "roberta": "RobertaTokenizer",
    "albert": "AlbertTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}


@dataclass(frozen=True)
class Family:
    """A model with its head, and what serves it."""

    folder: Path
    model: Any
    tokenizer: Any
    encoder: Encoder
    card: ModelCard

    def pipe(self, task: str, **options: Any) -> Any:
        """The pipeline of transformers, the reference."""
        return pipeline(task, model=self.model, tokenizer=self.tokenizer, device="cpu", **options)

    def answer(self, request: Request) -> TaskOutput:
        """Through prepare, tokenizer, the stock model, and postprocess."""
        task = TASKS[request.task]
        vocabulary = Vocabulary.read(self.encoder.definition) if task.needs_vocabulary else None
        arguments = task.arguments(request, vocabulary)
        batch = self.encoder.encode([task.prepare(request, self.card)])
        for failure in batch.failures.values():
            raise failure
        return task.postprocess(request, self.card, self.features(batch, task.head, arguments), vocabulary)

    def features(self, batch: TokenBatch, head: str, arguments: MaskArguments | None = None) -> Features:
        rows = [self._rows(batch.select(i, i + 1), head, arguments) for i in range(batch.num_sequences)]
        return Features(batch, np.concatenate(rows), np.cumsum([0, *map(len, rows)]).astype(np.int32))

    def _rows(self, one: TokenBatch, head: str, arguments: MaskArguments | None) -> FloatArray:
        """What the head leaves of one sequence, by the stock model alone."""
        inputs = {"input_ids": torch.from_numpy(one.input_ids.astype(np.int64))[None]}
        if one.token_type_ids is not None:
            inputs["token_type_ids"] = torch.from_numpy(one.token_type_ids.astype(np.int64))[None]
        with torch.inference_mode():
            out = self.model(**inputs)
        if head == "span-logits":
            return torch.stack([out.start_logits[0], out.end_logits[0]], dim=1).numpy()
        if head == "mask-fill":
            return self._fills(one, out.logits[0], arguments or MaskArguments(5))
        if head == "splade":
            weights = out.logits[0].relu().log1p().amax(0).numpy()
            index = np.flatnonzero(weights)
            return np.column_stack([index.astype(np.float32), weights[index]])
        if head == "tokens":
            return out.last_hidden_state[0].numpy()
        return out.logits.numpy() if head == "sequence-logits" else out.logits[0].numpy()

    def _fills(self, one: TokenBatch, logits: torch.Tensor, arguments: MaskArguments) -> FloatArray:
        rows = [np.zeros((0, 2), np.float32)]
        for mask in np.flatnonzero(one.input_ids == self.card.mask_token_id):
            chances = logits[mask].softmax(-1).numpy()
            ids = np.array(arguments.targets or np.argsort(-chances, kind="stable")[: arguments.top_k])
            rows.append(np.column_stack([ids.astype(np.float32), chances[ids]]))
        return np.concatenate(rows)


def tokenizer_of(family: str, **keys: Any) -> Any:
    """Of the class that transformers has for the family, which saves what it needs and no more."""
    kind = dict(keys)
    if family in ("bert", "distilbert"):
        trained = kinds.wordpiece(lowercase=family == "bert")
        kind["do_lower_case"] = family == "bert"
    elif family == "roberta":
        trained = kinds.byte_level()
    else:
        trained = kinds.albert() if family == "albert" else kinds.xlm_roberta()
    model = json.loads(trained.to_str())["model"]
    if "merges" in model:
        kind["merges"] = [tuple(merge) for merge in model["merges"]]
    if family == "albert":
        kind |= {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
        kind["mask_token"] = AddedToken("<mask>", lstrip=True, special=True)
    vocabulary = [tuple(piece) for piece in model["vocab"]] if model["type"] == "Unigram" else model["vocab"]
    return getattr(transformers, _TOKENIZERS[family])(vocab=vocabulary, **kind)


_LOUD = 2.0
"""Scale of the embeddings of token types, so that a wrong type moves every answer by more than a rounding error."""


@functools.cache
def family(name: str, auto_class: str, limit: int = LIMIT, side: str | None = None, **config: Any) -> Family:
    """One model of each kind; `config` may hold tuples for lists, `side` is the tokenizer's."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    words = tokenizer_of(name, model_max_length=limit, **({} if side is None else {"truncation_side": side}))
    words.save_pretrained(folder)
    sizes: dict[str, Any] = {
        "vocab_size": len(words),
        "pad_token_id": words.pad_token_id,
        "max_position_embeddings": 128,
    }
    sizes |= (
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
        if name == "distilbert"
        else {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    )
    labels = config.pop("labels", None)
    if labels is not None:
        sizes |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    torch.manual_seed(0)
    own = AutoConfig.for_model(name, **sizes, **config)
    model = getattr(transformers, auto_class).from_config(own, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, _LOUD if "token_type" in key else 0.25)
    model.save_pretrained(folder)
    return saved(folder, model, max_input_tokens=limit)


def saved(folder: Path, model: Any, **configured: Any) -> Family:
    """A model whose files lie in `folder`, read as a tokenizer replica reads it."""
    stock = read_stock_tokenizer(folder)
    card = stock.completed(read_card(folder, ModelConfig(name=folder.name, source="./tiny", **configured), ""))
    encoder = Encoder(folder, card.max_input_tokens, stock.answering(card.task))
    return Family(folder, model, AutoTokenizer.from_pretrained(str(folder)), encoder, card)


def with_card(given: Family, **keys: Any) -> Family:
    return replace(given, card=replace(given.card, **keys))


TEXTS = {
    "a sentence": "The model reads a long line of small words.",
    "one token": "a",
    "names": "Hugging Face Inc. was sent to New York, said Ångström's model (yet).",
    "emoji": "☕ 👩‍👩‍👧 🇩🇪 e",
    "combining": "e\u0301 Å A\u030a zero\u200bwidth n\u0303o",
    "right to left": "مرحبا بالعالم שלום עולם",
    "NUL": "nul\x00byte and more",
    "CRLF": "line\r\nline\r\n\r\nline",
    "no letters": " \t\r\n ",
    "special tokens": "a [SEP] b </s> c [UNK] <unk> d",
}
EMPTY = {"empty": ""}
LONG = {"long": "The model reads small words, they've said. " * 20, "no space": "w" * 10_000}


def of_length(given: Family, tokens: int) -> str:
    """A text that has exactly so many tokens, special ones included."""
    text = "the"
    while len(given.tokenizer(text)["input_ids"]) < tokens:
        text += ","
    assert len(given.tokenizer(text)["input_ids"]) == tokens
    return text
