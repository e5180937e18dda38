"""Make one tiny model of every task, with random weights from a seed: enough to see every route answer.

Their answers mean nothing. `deploy/examples/all-tasks.yaml` serves them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from transformers import PreTrainedModel, PreTrainedTokenizerFast

POSITIONS = 512
VOCABULARY_SIZE = 1000
CORPUS = (
    "What is Deep Learning? Deep Learning is a way for machines to learn from many examples.",
    "My name is Sarah and I live in London. The tower is 324 metres tall, about the same height as a building.",
    "Paris is the capital of France. I like you, I love you; it's a good film, and that was a bad dinner.",
    "Once upon a time there was a small cat. A kitten is a young cat, and the stock market is something else.",
    "A replica answers many requests at once: one model reads a long line of small words, naïve café, élève, 42 times.",
)
ENCODER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": POSITIONS,
}
DECODER = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": POSITIONS,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = token_decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY_SIZE, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return framed(tokenizer, "[CLS]", "[SEP]", **dict(zip(names, special, strict=True)))


def byte_level(start: str | None = None, end: str | None = None, prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """As RoBERTa's (`<s>`, `</s>`) or, without a frame, GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = token_decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if start and end:
        names |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    return framed(tokenizer, start, end, **names)


def unigram() -> PreTrainedTokenizerFast:
    """As T5's and Marian's: an end token, and no start token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = token_decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return framed(tokenizer, None, "</s>", **names)


def framed(tokenizer: Tokenizer, start: str | None, end: str | None, **names: str) -> PreTrainedTokenizerFast:
    """With special tokens around texts and between those of a pair."""
    if end is not None:
        head = f"{start} " if start else ""
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{head}$A {end}",
            pair=f"{head}$A {end} $B:1 {end}:1",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end) if token],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **names)


def labels(*names: str) -> dict[str, Any]:
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def classifier(class_name: str, *names: str) -> Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerFast]]:
    """A BERT with a head."""

    def make() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        tokenizer = wordpiece()
        return built(class_name, tokenizer, **ENCODER, **(labels(*names) if names else {})), tokenizer

    return make


def reranker() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = byte_level("<s>", "</s>")
    # RoBERTa's first position is the padding's id plus one.
    sizes = {**ENCODER, "max_position_embeddings": POSITIONS + 2, "type_vocab_size": 2}
    return built("RobertaForSequenceClassification", tokenizer, **sizes, **labels("relevance")), tokenizer


def generator() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT_TEMPLATE
    return built("GPT2LMHeadModel", tokenizer, n_embd=64, n_layer=2, n_head=4, n_positions=POSITIONS), tokenizer


def rewriter() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = unigram()
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    return built("T5ForConditionalGeneration", tokenizer, **sizes, decoder_start_token_id=0), tokenizer


def summarizer() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = byte_level("<s>", "</s>")
    return built("BartForConditionalGeneration", tokenizer, **DECODER, decoder_start_token_id=2), tokenizer


def translator() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = unigram()
    return built("MarianMTModel", tokenizer, **DECODER, decoder_start_token_id=0), tokenizer


def built(class_name: str, tokenizer: PreTrainedTokenizerFast, **sizes: Any) -> PreTrainedModel:
    """A model with random weights whose special tokens are the tokenizer's."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    ids = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    cls = getattr(transformers, class_name)
    model: PreTrainedModel = cls(cls.config_class(vocab_size=len(tokenizer), **{**ids, **sizes}))
    if model.can_generate():
        model.generation_config.max_new_tokens = 20
    return model


MODELS: Mapping[str, Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerFast]]] = {
    "text-classification": classifier("BertForSequenceClassification", "NEGATIVE", "POSITIVE"),
    "rerank": reranker,
    "zero-shot": classifier("BertForSequenceClassification", "contradiction", "neutral", "entailment"),
    "token-classification": classifier("BertForTokenClassification", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
    "fill-mask": classifier("BertForMaskedLM"),
    "question-answering": classifier("BertForQuestionAnswering"),
    "sparse-embedding": classifier("BertForMaskedLM"),
    "text-generation": generator,
    "text2text": rewriter,
    "summarization": summarizer,
    "translation": translator,
}
"""What makes the model of each name in all-tasks.yaml."""


def make(into: Path, names: Sequence[str] = tuple(MODELS), seed: int = 0) -> None:
    """Write each model as `save_pretrained` does, into a folder of its name."""
    for name in names:
        torch.manual_seed(seed)
        model, tokenizer = MODELS[name]()
        model.eval().save_pretrained(into / name)
        tokenizer.save_pretrained(into / name)
        print(f"made {into / name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path("~/.cache/serve_app/examples")
    parser.add_argument("--into", type=Path, default=default, help="directory for the models (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    args = parser.parse_args()
    make(args.into.expanduser(), seed=args.seed)


if __name__ == "__main__":
    main()
