"""Windows, cut sides of pairs and places in texts, against transformers' tokenizers."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from serve_app.errors import InputTooLongError, InvalidInputError
from serve_app.tokenizer.encoder import Encoder
from serve_app.tokenizer.framed import FramedTokenizer
from serve_app.types import Side, TextInput, TokenBatch, TokenizeRequest
from tests.tokenizer.kinds import LIMIT, byte_level, save, sequences, wordpiece

TEXTS = {
    "empty": "",
    "a word": "the",
    "long": "The model reads a long line of small words. " * 9,
    "emoji": "☕ 👩‍👩‍👧 🇩🇪 e\u0301 " * 12,
    "right to left": "مرحبا بالعالم שלום עולם " * 6,
    "NUL and CRLF": "nul\x00byte\r\nline\r\n" * 9,
    "no space": "w" * 10_000,
}


def one(encoder: Encoder, *inputs: TextInput, **keys: Any) -> TokenBatch:
    batch = encoder.encode([TokenizeRequest(inputs, **{"long_texts": "windows", **keys})])
    for failure in batch.failures.values():
        raise failure
    return batch


@pytest.mark.parametrize("stride", [0, 1, 21])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_windows_of_a_text_are_the_references(encoder: Encoder, reference: Any, text: str, stride: int) -> None:
    wanted = reference(
        text,
        truncation=True,
        max_length=LIMIT,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    batch = one(encoder, text, stride=stride, align=True, max_windows=100_000)
    assert sequences(batch) == wanted["input_ids"]
    assert batch.input_of is not None
    assert batch.input_of.tolist() == [0] * batch.num_sequences
    assert not batch.truncated.any()
    check_alignment(batch, wanted)


def check_alignment(batch: TokenBatch, wanted: Any) -> None:
    assert batch.alignment is not None
    whole = range(batch.num_sequences)
    assert batch.alignment.text_ids.tolist() == [-1 if t is None else t for i in whole for t in wanted.sequence_ids(i)]
    assert batch.alignment.word_ids.tolist() == [-1 if w is None else w for i in whole for w in wanted.word_ids(i)]
    assert batch.alignment.offsets.tolist() == [list(o) for each in wanted["offset_mapping"] for o in each]


@pytest.mark.parametrize("cut", ["only_first", "only_second"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_windows_of_a_pair_have_the_other_text_in_each(
    encoder: Encoder, reference: Any, text: str, cut: Literal["only_first", "only_second"]
) -> None:
    pair = (text, "the model") if cut == "only_first" else ("the model", text)
    wanted = reference(
        *([each] for each in pair),
        truncation=cut,
        max_length=LIMIT,
        stride=2,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    batch = one(encoder, pair, cut=cut, stride=2, align=True, max_windows=100_000)
    assert sequences(batch) == wanted["input_ids"]
    types = np.zeros_like(batch.input_ids) if batch.token_type_ids is None else batch.token_type_ids
    assert types.tolist() == [t for each in wanted["token_type_ids"] for t in each]
    check_alignment(batch, wanted)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("cut", ["only_first", "only_second", "longest_first"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_what_is_kept_of_a_pair_is_what_the_reference_keeps(
    encoder: Encoder, reference: Any, text: str, cut: Any, side: Side
) -> None:
    pairs = {"only_first": [(text, "the")], "only_second": [("the", text)]}
    for pair in pairs.get(cut, [(text, "the"), ("the", text), (text, "a long line " * 20)]):
        reference.truncation_side = side
        batched = [[each] for each in pair]  # alone, a pair without a second text would be no pair
        wanted = reference(*batched, truncation=cut, max_length=LIMIT, return_offsets_mapping=True)
        batch = one(encoder, pair, cut=cut, long_texts="truncate", truncation_side=side, align=True)
        assert sequences(batch) == wanted["input_ids"]
        assert batch.truncated.tolist() == [len(reference(*batched)["input_ids"][0]) > LIMIT]
        assert batch.alignment is not None
        assert batch.alignment.offsets.tolist() == [list(offsets) for offsets in wanted["offset_mapping"][0]]
    reference.truncation_side = "right"


@pytest.mark.parametrize("side", ["right", "left"])
def test_places_are_those_of_the_text_as_sent_though_only_a_part_is_read(encoder: Encoder, side: Side) -> None:
    text = "The model reads small words. " * 2_000
    batch = one(encoder, text, long_texts="truncate", truncation_side=side, align=True, prompt="query: ")
    assert batch.alignment is not None
    own = batch.alignment.offsets[batch.alignment.text_ids == 0]
    assert own.min() >= 0
    last = own[-1].tolist()
    assert last[1] <= 200 if side == "right" else last[1] >= len(text) - 1
    assert batch.truncated.all()


def test_a_prompt_is_in_no_place(encoder: Encoder, reference: Any) -> None:
    batch = one(encoder, "small words", prompt="one vector: ", align=True)
    assert sequences(batch) == [reference("one vector: small words")["input_ids"]]
    assert batch.alignment is not None
    assert batch.alignment.offsets.max() == len("small words")


def test_windows_and_whole_texts_of_several_requests_keep_their_order(encoder: Encoder) -> None:
    long, ids = TEXTS["long"], tuple(range(5, 5 + LIMIT + 3))
    requests = [
        TokenizeRequest(("the", long, ids), "windows", stride=2),
        TokenizeRequest(("the", long), "truncate"),
        TokenizeRequest(("the",), "windows", align=True),
    ]
    batch = encoder.encode(requests)
    alone = [encoder.encode([request]) for request in requests]
    assert sequences(batch) == [sequence for each in alone for sequence in sequences(each)]
    assert batch.input_of is not None
    first = batch.of_request(0)
    assert first.input_of is not None
    assert sorted(set(first.input_of.tolist())) == [0, 1, 2]
    assert np.bincount(first.input_of)[2] == 2
    assert batch.input_of[batch.sequences_of(1)].tolist() == [0, 1]


def test_a_lower_limit_than_the_models_can_be_asked_for(encoder: Encoder, reference: Any) -> None:
    text = TEXTS["long"]
    wanted = reference(text, truncation=True, max_length=9)["input_ids"]
    assert sequences(one(encoder, text, long_texts="truncate", max_tokens=9)) == [wanted]
    assert one(encoder, text, long_texts="truncate", max_tokens=900).lengths().tolist() == [LIMIT]
    with pytest.raises(InputTooLongError, match="tokens, and the model takes 9"):
        one(encoder, text, long_texts="error", max_tokens=9)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder(save(wordpiece(), tmp_path_factory.mktemp("words")), LIMIT)


@pytest.mark.parametrize("stride", [-1, 22, 24, 10**9])
def test_a_stride_that_leaves_nothing_new_in_a_window_is_refused(words: Encoder, stride: int) -> None:
    with pytest.raises(InvalidInputError, match=r"stride: .* must be 0 to 21"):
        one(words, TEXTS["long"], stride=stride)
    assert one(words, TEXTS["long"], stride=21).num_sequences > 2


def test_a_stride_gives_way_where_the_other_text_of_a_pair_leaves_little_room(words: Encoder) -> None:
    pair = ("the " * 17, TEXTS["long"])
    batch = one(words, pair, cut="only_second", stride=20)
    assert batch.num_sequences > 2
    assert int(batch.lengths().max()) == LIMIT


@pytest.mark.parametrize("long_texts", ["windows", "truncate"])
def test_a_text_that_must_stay_whole_and_is_too_long_is_refused(words: Encoder, long_texts: Any) -> None:
    with pytest.raises(InputTooLongError, match=r"inputs\[0\]: its second text takes all of the 24 tokens"):
        one(words, (TEXTS["long"], "the " * 22), cut="only_first", long_texts=long_texts)


def test_more_windows_than_allowed_are_refused_with_both_numbers(words: Encoder) -> None:
    text = "the " * 220
    assert one(words, text, max_windows=10).num_sequences == 10
    with pytest.raises(InputTooLongError, match="10 windows of 24 tokens are needed, and one request may have 9"):
        one(words, text, max_windows=9)
    with pytest.raises(InputTooLongError, match="20 windows of 24 tokens are needed, and one request may have 19"):
        one(words, text, text, max_windows=19)
    assert one(words, *["the"] * 40, max_windows=9).num_sequences == 40


def test_of_a_text_with_far_too_many_windows_only_a_part_is_read(words: Encoder) -> None:
    with pytest.raises(
        InputTooLongError, match=r"at least .* windows of 24 tokens are needed, and one request may have 2"
    ):
        one(words, "the model " * 100_000, max_windows=2)


def test_of_a_text_whose_windows_share_nearly_all_even_less_is_read(words: Encoder) -> None:
    text = "the " * 250_000
    with pytest.raises(InputTooLongError, match="at least") as refused:
        one(words, text, stride=21, max_windows=512, align=True)
    told = int(refused.value.message.split("at least ")[1].split()[0])
    assert 512 < told < 20_000
    with pytest.raises(InputTooLongError, match="at least"):
        one(words, ("who?", text), cut="only_second", stride=20, max_windows=512)


def test_no_room_for_text_is_refused(words: Encoder) -> None:
    with pytest.raises(InvalidInputError, match="2 tokens leave no room"):
        one(words, "the", max_tokens=2)


def test_a_lone_surrogate_fails_alone(words: Encoder) -> None:
    good = TokenizeRequest(("the",), "windows")
    batch = words.encode([good, TokenizeRequest(("a \ud83d b",), "windows", align=True), good])
    assert list(batch.failures) == [1]
    assert isinstance(batch.failures[1], InvalidInputError)
    assert batch.num_sequences == 2


def test_threads_with_different_windows_get_what_one_thread_gets(tmp_path: Path) -> None:
    encoder = Encoder(save(byte_level(), tmp_path), LIMIT)
    requests = [TokenizeRequest((TEXTS["long"],), "windows", stride=s, max_tokens=m) for s in (0, 3) for m in (9, 24)]
    serial = [sequences(encoder.encode([request])) for request in requests]
    wrong: list[int] = []

    def work(index: int) -> None:
        wrong.extend(index for _ in range(50) if sequences(encoder.encode([requests[index]])) != serial[index])

    threads = [threading.Thread(daemon=True, target=work, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len({str(each) for each in serial}) == len(requests)


def test_the_tokenizer_itself_is_never_changed(words: Encoder) -> None:
    framed: FramedTokenizer = words._framed
    one(words, TEXTS["long"], stride=2)
    assert framed._tokenizer.truncation is None
    assert framed._tokenizer.padding is None
