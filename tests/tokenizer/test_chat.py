"""Conversations, against transformers' own way of applying a chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from serve_app.errors import InvalidInputError
from serve_app.tokenizer.encoder import Encoder
from serve_app.types import Chat, ChatMessage, TokenizeRequest
from tests.tokenizer.kinds import qwen, save

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('Unknown role ' + message['role']) }}
{%- endif %}<{{ message['role'] }}>{{ message['content'] | trim }}</s>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""

TALK = (ChatMessage("system", "the model"), ChatMessage("user", " small words ☕ </s>"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    PreTrainedTokenizerFast(
        tokenizer_object=qwen(), bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    ).save_pretrained(path)
    return path


def test_a_conversation_has_the_references_ids_and_no_further_special_tokens(folder: Path) -> None:
    messages = [{"role": message.role, "content": message.content} for message in TALK]
    reference = AutoTokenizer.from_pretrained(str(folder))
    wanted = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    request = TokenizeRequest(("plain", Chat(TALK), (5, 6), Chat(TALK[1:])), "error")
    batch = Encoder(folder, 200).encode([request])
    assert batch.select(1, 2).input_ids.tolist() == wanted
    assert batch.select(0, 1).input_ids.tolist() == reference("plain")["input_ids"]
    assert batch.select(2, 3).input_ids.tolist() == [5, 6]


def test_what_the_template_refuses_fails_alone_with_its_reason(folder: Path) -> None:
    good, bad = Chat(TALK), Chat((ChatMessage("wizard", "hello"),))
    batch = Encoder(folder, 200).encode([TokenizeRequest((good,), "error"), TokenizeRequest((bad,), "error")])
    assert list(batch.failures) == [1]
    assert isinstance(batch.failures[1], InvalidInputError)
    assert "Unknown role wizard" in batch.failures[1].message


def test_a_long_conversation_keeps_its_end(folder: Path) -> None:
    encoder = Encoder(folder, 12)
    batch = encoder.encode([TokenizeRequest((Chat(TALK),), "truncate", "left")])
    whole = Encoder(folder, 200).encode([TokenizeRequest((Chat(TALK),), "error")])
    assert batch.input_ids.tolist() == whole.input_ids.tolist()[-12:]
    assert batch.truncated.tolist() == [True]


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    encoder = Encoder(save(qwen(), tmp_path), 200)
    batch = encoder.encode([TokenizeRequest((Chat(TALK),), "error")])
    assert "no chat template" in batch.failures[0].message
