"""What is read of a tokenizer, against the objects of transformers and sentence-transformers that would be used."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, BertConfig, RobertaConfig

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError, IncompleteModelError
from serve_app.tasks.card import read_card
from serve_app.tasks.stock_tokenizer import read_stock_tokenizer
from serve_app.tokenizer.deployment import check_pairs
from serve_app.tokenizer.encoder import Encoder
from serve_app.types import TokenizeRequest
from tests.reference import minilm_folder
from tests.tasks.families import FAMILIES, family, tokenizer_of
from tests.tokenizer.kinds import TYPED, byte_level, save, sequences, wordpiece, xlm_roberta
from tests.tokenizer.sentencepieces import save_marian, save_t5

LIMIT = 24
TEXTS = ("The Model reads É words", "It's a TEST; [MASK] and </s> ☕")


def edit(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **keys}))


def bert_of_words(folder: Path) -> None:
    """Of BERT's first files, which leave most to the class."""
    tokens = sorted((vocabulary := wordpiece().get_vocab()), key=lambda token: vocabulary[token])
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens), "utf-8")
    edit(folder / "config.json", model_type="bert")


def cased_bert(folder: Path) -> None:
    bert_of_words(folder)
    edit(folder / "tokenizer_config.json", do_lower_case=False)


def cased_bert_beside_json(folder: Path) -> None:
    """`tokenizer.json` lower-cases, and what stands beside it says not to."""
    tokenizer_of("bert").save_pretrained(folder)
    edit(folder / "config.json", model_type="bert")
    edit(folder / "tokenizer_config.json", do_lower_case=False)


def roberta_with_space(folder: Path) -> None:
    tokenizer_of("roberta").save_pretrained(folder)
    edit(folder / "config.json", model_type="roberta")
    edit(folder / "tokenizer_config.json", add_prefix_space=True)


def roberta_without_config(folder: Path) -> None:
    save(byte_level(), folder)
    edit(folder / "config.json", model_type="roberta")
    (folder / "tokenizer_config.json").unlink()


def named_in_the_map(folder: Path) -> None:
    """Special tokens of `special_tokens_map.json`, and added ones of `added_tokens.json`, as version 4 wrote them."""
    bert_of_words(folder)
    edit(folder / "special_tokens_map.json", cls_token="[unused]", mask_token={"content": "[MASK]", "lstrip": True})
    edit(folder / "added_tokens.json", **{"[unused]": 378, "tEsT": 379})


def cutting_left(folder: Path) -> None:
    """`tokenizer.json` says how it is cut."""
    words = wordpiece()
    words.enable_truncation(12, direction="left")
    words.enable_padding(direction="left", pad_token="[PAD]")
    save(words, folder)


def llama(folder: Path, **keys: Any) -> None:
    """With a SentencePiece model alone, so that version 5 writes the frame by `add_bos_token` and `add_eos_token`."""
    save_t5(folder, LIMIT)
    (folder / "spiece.model").rename(folder / "tokenizer.model")
    edit(folder / "config.json", model_type="llama")
    (folder / "tokenizer_config.json").unlink()
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", **keys)


def llama_with_end(folder: Path) -> None:
    llama(folder, add_eos_token=True, add_bos_token=False)


def llama_with_end_beside_json(folder: Path) -> None:
    save(byte_level(), folder, bos_token="<s>", eos_token="</s>")
    edit(folder / "config.json", model_type="llama")
    edit(folder / "tokenizer_config.json", add_eos_token=True)


def xlnet(folder: Path, **keys: Any) -> None:
    pieces = [tuple(piece) for piece in json.loads(xlm_roberta().to_str())["model"]["vocab"]]
    words = transformers.XLNetTokenizer(vocab=[*pieces, ("<sep>", 0.0), ("<cls>", 0.0)], **keys)
    words.save_pretrained(folder)
    edit(folder / "config.json", model_type="xlnet")


def xlnet_with_types(folder: Path) -> None:
    xlnet(folder, model_input_names=list(TYPED))


MADE: tuple[Callable[[Path], None], ...] = (
    bert_of_words,
    cased_bert,
    cased_bert_beside_json,
    roberta_with_space,
    roberta_without_config,
    named_in_the_map,
    cutting_left,
    llama,
    llama_with_end,
    llama_with_end_beside_json,
    xlnet,
    xlnet_with_types,
)


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_a_tokenizer_is_what_transformers_makes_of_all_its_files(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    reference = AutoTokenizer.from_pretrained(str(tmp_path))
    stock, encoder = read_stock_tokenizer(tmp_path), Encoder(tmp_path, LIMIT)
    for name in ("cls_token_id", "mask_token_id", "pad_token_id", "unk_token_id", "padding_side", "truncation_side"):
        assert getattr(stock, name) == getattr(reference, name), name
    for inputs in (TEXTS, tuple((text, "Words") for text in TEXTS)):
        batch = encoder.encode([TokenizeRequest(inputs, "truncate", stock.truncation_side)])
        wanted = [
            reference(*([each] if isinstance(each, str) else each), truncation=True, max_length=LIMIT, padding=False)
            for each in inputs
        ]
        assert sequences(batch) == [each["input_ids"] for each in wanted]
        types = [t for each in wanted for t in each.get("token_type_ids", [])]
        assert (types if any(types) else None) == (
            None if batch.token_type_ids is None else batch.token_type_ids.tolist()
        )


def test_the_last_token_of_a_text_is_the_end_where_the_files_add_one(tmp_path: Path) -> None:
    llama_with_end(tmp_path)
    (ids,) = sequences(Encoder(tmp_path, LIMIT).encode([TokenizeRequest(("small words",), "truncate")]))
    assert ids[-1] == AutoTokenizer.from_pretrained(str(tmp_path)).eos_token_id
    assert ids[0] != AutoTokenizer.from_pretrained(str(tmp_path)).bos_token_id


def test_the_token_types_of_xlnets_single_texts_reach_the_model(tmp_path: Path) -> None:
    xlnet_with_types(tmp_path)
    batch = Encoder(tmp_path, LIMIT).encode([TokenizeRequest(("small words",), "truncate")])
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist()[-2:] == [0, 2]
    windows = Encoder(tmp_path, LIMIT).encode([TokenizeRequest(("small words " * 30,), "windows", stride=2)])
    assert windows.token_type_ids is not None
    assert windows.token_type_ids[windows.cu_seqlens[1:] - 1].tolist() == [2] * windows.num_sequences


@pytest.mark.parametrize(
    ("name", "given"),
    [("bert", True), ("albert", True), ("distilbert", False), ("roberta", False), ("xlm-roberta", False)],
)
def test_questions_have_the_token_types_of_transformers_4(name: str, given: bool, tmp_path: Path) -> None:
    """By `model_input_names` of the classes of transformers 4.57.6."""
    tokenizer_of(name).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", model_type=name)
    assert read_stock_tokenizer(tmp_path).answering("question-answering").gives_token_types == given
    named = "token_type_ids" in AutoTokenizer.from_pretrained(str(tmp_path)).model_input_names
    assert read_stock_tokenizer(tmp_path).answering("rerank").gives_token_types == named


def test_a_generic_tokenizer_has_token_types_for_questions_alone(tmp_path: Path) -> None:
    stock = read_stock_tokenizer(save(wordpiece(), tmp_path / "silent"))
    assert (stock.gives_token_types, stock.gave_token_types) == (False, True)
    stock = read_stock_tokenizer(save(wordpiece(), tmp_path / "told", model_input_names=["input_ids"]))
    assert (stock.gives_token_types, stock.gave_token_types) == (False, False)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_process_reads_the_same(name: str) -> None:
    """As a tokenizer replica reads it, which has not loaded transformers."""
    folder = family(name, "AutoModel").folder
    assert apart(folder) == repr(read_stock_tokenizer(folder))


def test_what_goes_wrong_in_another_process_is_told(tmp_path: Path) -> None:
    save_marian(tmp_path, LIMIT)
    edit(tmp_path / "config.json", model_type="marian")
    assert "definition=None" in apart(tmp_path)
    (tmp_path / "source.spm").write_bytes(b"no model")
    with pytest.raises(IncompleteModelError) as told:
        read_stock_tokenizer(tmp_path)
    assert told.value.message in apart(tmp_path)


def apart(folder: Path) -> str:
    """What a process that has not loaded transformers, and does not load it, reads or is told."""
    code = (
        "import sys; from pathlib import Path; from serve_app.errors import IncompleteModelError\n"
        "from serve_app.tasks.stock_tokenizer import read_stock_tokenizer\n"
        "try: print(read_stock_tokenizer(Path(sys.argv[1])))\n"
        "except IncompleteModelError as error: print(error.message)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return done.stdout.rstrip("\n")


@pytest.mark.parametrize("kind", ["wordpiece", "byte-level"])
def test_a_sentence_transformer_is_lower_cased_where_its_options_say_so(kind: str, tmp_path: Path) -> None:
    words = wordpiece(lowercase=False) if kind == "wordpiece" else byte_level()
    save(words, tmp_path / "bare", pad_token="[PAD]" if kind == "wordpiece" else "<pad>")
    config = BertConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(tmp_path / "bare")
    folder = tmp_path / "saved"
    SentenceTransformer(str(tmp_path / "bare"), device="cpu").save_pretrained(str(folder))
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    reference = SentenceTransformer(str(folder), device="cpu")
    wanted = [reference.preprocess([text])["input_ids"][0].tolist() for text in TEXTS]
    got = sequences(Encoder(folder, 64).encode([TokenizeRequest(TEXTS, "truncate")]))
    assert got == wanted
    assert got != sequences(Encoder(tmp_path / "bare", 64).encode([TokenizeRequest(TEXTS, "truncate")]))


def one_type(folder: Path, architecture: str) -> Path:
    """A model that knows one token type, with a tokenizer that gives a pair two."""
    save(byte_level(), folder, model_input_names=list(TYPED))
    RobertaConfig(type_vocab_size=1, architectures=[architecture], num_labels=1).save_pretrained(folder)
    return folder


def test_a_pair_that_has_more_token_types_than_the_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    encoder = Encoder(one_type(tmp_path, "RobertaModel"), LIMIT)
    requests = [TokenizeRequest((text,), "truncate") for text in ("small", ("small", "words"))]
    for framed in (False, True):
        asked = [TokenizeRequest(each.inputs, "truncate", align=framed) for each in requests]
        batch = encoder.encode(asked)
        assert list(batch.failures) == [1]
        assert "the model knows only 1 (its type_vocab_size)" in batch.failures[1].message


def test_a_model_for_pairs_is_refused_where_it_has_no_token_types_for_them(tmp_path: Path) -> None:
    folder = one_type(tmp_path, "RobertaForSequenceClassification")
    card = read_card(folder, ModelConfig(name="m", source="./m", max_input_tokens=LIMIT), "")
    with pytest.raises(ConfigError, match=r"models\.m\.task: rerank is about pairs: the tokenizer gives"):
        check_pairs(card, Encoder(folder, LIMIT))


def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    edit(tmp_path / "config.json", model_type="bert")
    with pytest.raises(IncompleteModelError, match="no tokenizer can be made"):
        read_stock_tokenizer(tmp_path)


def test_the_real_model_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(minilm_folder(), tmp_path / "model"))
    reference, stock = AutoTokenizer.from_pretrained(str(folder)), read_stock_tokenizer(folder)
    assert (stock.cls_token_id, stock.gives_token_types, stock.token_types) == (reference.cls_token_id, True, 2)
