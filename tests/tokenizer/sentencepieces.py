"""Folders as tokenizers of SentencePiece write them where there is no tokenizer.json: T5's and Marian's."""

from __future__ import annotations

import json
import random
from pathlib import Path

import sentencepiece
from transformers import MarianTokenizer

_SAID = (
    "the model reads a long line of small words and gives back one vector for each text it was sent "
    "Größe naïve café Ångström мир ёлка 你好 世界 don't 42 3.14 (yet) ☕"
)


def trained(folder: Path) -> Path:
    """A model of a few hundred sentences, with T5's special tokens."""
    chance = random.Random(0)
    words = _SAID.split()
    sentences = [" ".join(chance.choices(words, k=chance.randint(3, 12))) + chance.choice(".?!") for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "spiece"),
        vocab_size=200,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    return folder / "spiece.model"


def save_t5(folder: Path, limit: int) -> None:
    trained(folder)
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": limit}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_marian(folder: Path, limit: int) -> None:
    """Pieces have other ids than SentencePiece gives them, and the last few have none."""
    pieces = folder / "pieces"
    pieces.mkdir()
    model = trained(pieces)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    known = [processor.id_to_piece(i) for i in range(3, processor.get_piece_size() - 5)]
    words = ["</s>", "<unk>", *reversed(known), ">>fra<<", ">>deu<<", "<pad>"]
    vocabulary = pieces / "vocab.json"
    vocabulary.write_text(json.dumps({word: index for index, word in enumerate(words)}))
    MarianTokenizer(str(model), str(model), str(vocabulary), model_max_length=limit).save_pretrained(folder)
