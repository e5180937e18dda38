"""Conversations, against transformers' own way of applying a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from serve_app.errors import InvalidInputError
from serve_app.tokenizer.encoder import Encoder
from serve_app.types import Chat, ChatMessage, TokenizeRequest
from tests.tokenizer.kinds import qwen, save, wordpiece

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('Unknown role ' + message['role']) }}
{%- endif %}<{{ message['role'] }}>{{ message['content'] | trim }}</s>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""

TOOLS = """{% for m in messages %}<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>
{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{%- for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}
{%- if m.tool_call_id %}[{{ m.tool_call_id }}]{% endif %}{{ m.content }}</s>{% endfor %}
{%- if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}<think></think>
{%- endif %}{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}{% endif %}"""

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


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tools")
    PreTrainedTokenizerFast(
        tokenizer_object=qwen(), bos_token="<s>", eos_token="</s>", chat_template=TOOLS
    ).save_pretrained(path)
    return path


def ids_of(folder: Path, chat: Chat) -> list[int]:
    batch = Encoder(folder, 400).encode([TokenizeRequest((chat,), "error")])
    if batch.failures:
        raise batch.failures[0]
    found: list[int] = batch.input_ids.tolist()
    return found


BEGUN = (*TALK, ChatMessage("assistant", "the small "))


@pytest.mark.parametrize("last", ["the small ", "the", "the small\n"])
def test_a_final_message_is_continued_as_by_the_pipeline(folder: Path, last: str) -> None:
    messages = [{"role": m.role, "content": m.content} for m in TALK] + [{"role": "assistant", "content": last}]
    reference = AutoTokenizer.from_pretrained(str(folder))
    wanted = reference.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    chat = Chat((*TALK, ChatMessage("assistant", last)), continues=True, begins_turn=False)
    assert ids_of(folder, chat) == wanted


def test_no_turn_is_begun_where_none_is_asked_for(folder: Path) -> None:
    messages = [{"role": m.role, "content": m.content} for m in TALK]
    reference = AutoTokenizer.from_pretrained(str(folder))
    wanted = reference.apply_chat_template(messages, add_generation_prompt=False, return_dict=False)
    assert ids_of(folder, Chat(TALK, begins_turn=False)) == wanted


def test_a_message_that_cannot_be_continued_is_refused_without_being_repeated(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}{# m.content #}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=qwen(), chat_template=template).save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="continue_final_message") as refused:
        ids_of(tmp_path, Chat(BEGUN, continues=True, begins_turn=False))
    assert "small" not in refused.value.message


def test_a_template_reads_calls_names_and_reasons_as_the_reference_does(with_tools: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
    turns = (
        ChatMessage("user", "the words", {"name": "me"}),
        ChatMessage("assistant", "", {"tool_calls": [call], "reasoning_content": "hm"}),
        ChatMessage("tool", "3", {"tool_call_id": "1", "name": "add"}),
    )
    variables = {"enable_thinking": False, "reasoning_effort": "low"}
    messages = [{"role": turn.role, "content": turn.content, **turn.fields} for turn in turns]
    reference = AutoTokenizer.from_pretrained(str(with_tools))
    wanted = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **variables)
    assert ids_of(with_tools, Chat(turns, variables=variables)) == wanted
    plain = reference.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in turns], add_generation_prompt=True, return_dict=False
    )
    assert plain != wanted


@pytest.mark.parametrize(
    "variables",
    [
        {"reasoning_effort": "low"},
        {"enable_thinking": True},
        {"messages": []},
        {"chat_template": "{{ 1 }}"},
        {"add_generation_prompt": False},
        {"raise_exception": "x"},
        {"tokenize": True},
    ],
    ids=repr,
)
def test_a_variable_that_the_template_does_not_read_is_refused_by_name(folder: Path, variables: dict[str, Any]) -> None:
    (name,) = variables
    with pytest.raises(InvalidInputError, match=f"does not read `{name}`"):
        ids_of(folder, Chat(TALK, variables=variables))


def test_a_variable_that_says_nothing_is_accepted(folder: Path) -> None:
    assert ids_of(folder, Chat(TALK, variables={"enable_thinking": False, "x": None})) == ids_of(folder, Chat(TALK))


def test_empty_texts_are_the_special_tokens_and_where_there_are_none_they_are_named(tmp_path: Path) -> None:
    encoder = Encoder(save(wordpiece(), tmp_path / "bert"), 50)
    batch = encoder.encode([TokenizeRequest(("", "a", ("", ""), ""), "error")])
    whole = AutoTokenizer.from_pretrained(str(tmp_path / "bert"))
    assert batch.select(0, 1).input_ids.tolist() == whole("")["input_ids"]
    assert batch.select(2, 3).input_ids.tolist() == whole([""], [""])["input_ids"][0]
    plain = qwen()
    plain.post_processor = processors.ByteLevel()
    bare = Encoder(save(plain, tmp_path / "qwen"), 50).encode([TokenizeRequest(("a", ""), "error")])
    assert bare.failures[0].message.startswith("inputs[1]: has no tokens")
