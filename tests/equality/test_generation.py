"""Generation over HTTP, from a text, of a summary or a translation: the tokens of `generate`, run alone and seeded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import decoders, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from serve_app.config import ModelConfig
from serve_app.options import GenerationOptions
from tests.equality.matrix import TOLERANCE, ask, refusal
from tests.inprocess import served
from tests.model.generation.models import WINDOW, configured, reference, tiny
from tests.tasks.families import TEXTS
from tests.tokenizer.kinds import byte_level, qwen
from tests.tokenizer.sentencepieces import save_marian, save_t5

DECODERS = ("gpt2", "llama", "qwen2")
NEW_TOKENS = 12
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FRAMES = {"gpt2": "$A", "llama": "<s> $A", "qwen2": "$A", "bart": "<s> $A </s>", "t5": "$A </s>", "marian": "$A </s>"}
PREFIXES = {
    "summarization": {"prefix": "summarize: "},
    "translation_en_to_fr": {"prefix": "translate English to French: "},
    "translation_en_to_de": {"prefix": "translate English to German: "},
}
CONFIGURED: dict[str, dict[str, Any]] = {
    "gpt2-configured": {"max_new_tokens": 7, "do_sample": True, "top_k": 5, "temperature": 0.8},
    "bart-configured": {"max_new_tokens": 9, "num_beams": 2, "repetition_penalty": 1.2},
    "bart-of-a-length": {"max_length": 14, "min_length": 6, "no_repeat_ngram_size": 2},
    "gpt2-lengths": {"max_length": 30, "min_length": 25, "do_sample": False},
    "bart-lengths": {"max_length": 12, "min_length": 8},
    "t5-lengths": {"max_length": 11, "min_length": 6},
    "marian-lengths": {"max_length": 10, "num_beams": 2},
}
"""What the generation config of each model says."""

GREEDY_AND_SEEDED: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "seed": 1, "temperature": 1.0},
    {"do_sample": True, "seed": 2, "temperature": 0.7, "top_k": 5},
    {"do_sample": True, "seed": 3, "temperature": 1.5, "top_p": 0.8},
    {"do_sample": False, "repetition_penalty": 1.3},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": True, "seed": 4, "temperature": 1.0, "min_new_tokens": 10},
]


@dataclass(frozen=True)
class Generator:
    """A model as it is served, and what the reference needs of it."""

    folder: Path
    task: str
    model: Any
    tokenizer: Any

    def prompt(self, text: str, new_tokens: int = NEW_TOKENS) -> list[int]:
        """The ids of a text, cut as the documentation says: room for the answer, up to a quarter of the window."""
        if self.model.config.is_encoder_decoder:
            return list(self.tokenizer(text, truncation=True, max_length=WINDOW)["input_ids"])
        room = min(new_tokens, WINDOW // 4)
        return list(self.tokenizer(text, truncation=True, max_length=WINDOW - room)["input_ids"])

    def tokens(self, text: str, **options: Any) -> list[int]:
        prompt = self.prompt(text, options.get("max_new_tokens", NEW_TOKENS))
        return reference(self.model, prompt, GenerationOptions(**options))

    def answer(self, text: str, **options: Any) -> str:
        decoded: str = self.tokenizer.decode(self.tokens(text, **options), skip_special_tokens=True)
        return decoded


Generators = Mapping[str, Generator]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Generators:
    root = tmp_path_factory.mktemp("models")
    made = {name: generator(root / name, name, "text-generation") for name in DECODERS}
    made |= {name: generator(root / name, name, "text2text-generation") for name in ("t5", "bart")}
    for name, chosen in CONFIGURED.items():
        task = "text-generation" if name.startswith("gpt2") else "text2text-generation"
        made[name] = generator(root / name, name.partition("-")[0], task)
        edit(root / name / "generation_config.json", chosen)
    made["bart-summarization"] = generator(root / "bart-summarization", "bart", "summarization")
    made["t5-summarization"] = generator(root / "t5-summarization", "t5", "summarization", PREFIXES)
    made["marian-translation"] = generator(root / "marian-translation", "marian", "translation")
    made["marian-pieces"] = piecewise(root / "marian-pieces", "marian", "translation", save_marian)
    made["t5-pieces"] = piecewise(root / "t5-pieces", "t5", "text2text-generation", save_t5)
    made["t5-translation"] = generator(root / "t5-translation", "t5", "translation", PREFIXES)
    return made


def generator(folder: Path, model_type: str, task: str, prefixes: Any = None) -> Generator:
    model = tiny(model_type)
    model.save_pretrained(folder)
    if prefixes is not None:
        edit(folder / "config.json", {"task_specific_params": prefixes})
    backend = qwen() if model_type == "qwen2" else byte_level()
    backend.decoder = decoders.ByteLevel()
    special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=FRAMES[model_type], special_tokens=special)
    side = "right" if model.config.is_encoder_decoder else "left"
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=WINDOW,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        truncation_side=side,
    )
    words.chat_template = CHAT_TEMPLATE
    words.save_pretrained(folder)
    return Generator(folder, task, model, AutoTokenizer.from_pretrained(str(folder)))


def piecewise(folder: Path, model_type: str, task: str, save: Callable[[Path, int], None]) -> Generator:
    """With a tokenizer of SentencePiece alone, without a tokenizer.json."""
    folder.mkdir()
    save(folder, WINDOW)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    words = AutoTokenizer.from_pretrained(str(folder))
    model = tiny(model_type, len(words))
    model.save_pretrained(folder)
    return Generator(folder, task, model, words)


def edit(file: Path, keys: Mapping[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.fixture(scope="module")
def url(models: Generators, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    configs = [
        ModelConfig(name=name, source=str(given.folder), task=given.task, max_input_tokens=WINDOW)  # type: ignore[arg-type]
        for name, given in models.items()
    ]
    with served(configs, tmp_path_factory.mktemp("cache")) as base:
        yield f"{base}/models"


def texts() -> list[str]:
    """The matrix's, and one that is too long in words and one without a space."""
    return [*TEXTS.values(), "The model reads small words. " * 20, "w" * 10_000]


@pytest.mark.parametrize("name", DECODERS)
def test_generated_texts_are_the_pipelines(name: str, url: str, models: Generators) -> None:
    given = models[name]
    pipe = pipeline("text-generation", model=given.model, tokenizer=given.tokenizer, device="cpu")
    options = [{**chosen, "max_new_tokens": NEW_TOKENS} for chosen in GREEDY_AND_SEEDED]
    fitting = [text for text in texts() if len(given.tokenizer(text)["input_ids"]) <= WINDOW - NEW_TOKENS]
    answers = ask(f"{url}/{name}", [{"inputs": fitting, "parameters": chosen} for chosen in options])
    [full] = ask(f"{url}/{name}", [{"inputs": fitting, "parameters": {**options[0], "return_full_text": True}}])
    for got, chosen in zip(answers, options, strict=True):
        seed = chosen.get("seed", 0)
        keys = {key: value for key, value in chosen.items() if key != "seed"}
        for text, each in zip(fitting, got, strict=True):
            torch.manual_seed(seed)
            assert [each] == pipe(text, return_full_text=False, **keys)
    for text, each in zip(fitting, full, strict=True):
        assert [each] == pipe(text, max_new_tokens=NEW_TOKENS, do_sample=False)


@pytest.mark.parametrize("name", DECODERS)
def test_generated_tokens_are_those_of_generate_where_a_prompt_is_cut_too(
    name: str, url: str, models: Generators
) -> None:
    given = models[name]
    options = [{**chosen, "max_new_tokens": 16} for chosen in GREEDY_AND_SEEDED if "num_beams" not in chosen]
    bodies = [{"inputs": texts(), "parameters": {**chosen, "details": True, "truncate": True}} for chosen in options]
    for got, chosen in zip(ask(f"{url}/{name}", bodies), options, strict=True):
        for text, each in zip(texts(), got, strict=True):
            wanted = given.tokens(text, **chosen)
            assert [token["id"] for token in each["details"]["tokens"]] == wanted
            assert each["generated_text"] == given.tokenizer.decode(wanted, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("name", "key", "prefix"),
    [
        ("t5", "generated_text", ""),
        ("bart", "generated_text", ""),
        ("bart-summarization", "summary_text", ""),
        ("t5-summarization", "summary_text", "summarize: "),
        ("marian-translation", "translation_text", ""),
        ("marian-pieces", "translation_text", ""),
        ("t5-pieces", "generated_text", ""),
    ],
)
def test_texts_of_texts_are_those_of_generate(name: str, key: str, prefix: str, url: str, models: Generators) -> None:
    given, asked = models[name], ["", *texts()]
    options = [{**chosen, "max_new_tokens": NEW_TOKENS} for chosen in GREEDY_AND_SEEDED]
    bodies: list[dict[str, Any]] = [{"inputs": asked, "parameters": chosen} for chosen in options]
    nested = {"inputs": asked, "parameters": {"generate_parameters": options[1]}}
    *answers, again = ask(f"{url}/{name}", [*bodies, nested])
    for got, chosen in zip(answers, options, strict=True):
        assert got == [{key: given.answer(prefix + text, **chosen)} for text in asked]
    assert again == answers[1]


SUPPORTED: list[dict[str, Any]] = [
    {"max_length": 9},
    {"max_length": 20, "min_length": 15},
    {"max_new_tokens": 8, "max_length": 3},
    {"max_new_tokens": NEW_TOKENS, "num_beams": 3, "length_penalty": 3.0, "early_stopping": True},
    {"max_new_tokens": NEW_TOKENS, "num_beams": 3, "length_penalty": -2.0, "early_stopping": "never"},
    {"max_length": 15, "min_length": 9, "num_beams": 2, "no_repeat_ngram_size": 2},
    {"max_new_tokens": NEW_TOKENS, "no_repeat_ngram_size": 1},
    {"max_new_tokens": NEW_TOKENS, "encoder_no_repeat_ngram_size": 1},
    {"max_new_tokens": NEW_TOKENS, "encoder_repetition_penalty": 5.0},
    {"max_new_tokens": NEW_TOKENS, "repetition_penalty": 3.0, "min_new_tokens": 9},
    {"max_new_tokens": NEW_TOKENS, "do_sample": True, "seed": 1, "typical_p": 0.3},
    {"max_new_tokens": NEW_TOKENS, "do_sample": True, "seed": 2, "top_k": 0, "min_p": 0.2},
    {"max_new_tokens": NEW_TOKENS, "do_sample": True, "seed": 3, "top_k": 0, "epsilon_cutoff": 0.05},
    {"max_new_tokens": NEW_TOKENS, "do_sample": True, "seed": 4, "eta_cutoff": 0.05, "renormalize_logits": True},
    {"max_new_tokens": NEW_TOKENS, "do_sample": True, "seed": 5, "num_beams": 2, "temperature": 1.5},
]


@pytest.mark.parametrize(
    ("name", "key"), [("bart", "generated_text"), ("t5", "generated_text"), ("marian-translation", "translation_text")]
)
def test_generate_parameters_mean_what_generate_makes_of_them(
    name: str, key: str, url: str, models: Generators
) -> None:
    given, asked = models[name], list(TEXTS.values())[:6]
    bodies = [{"inputs": asked, "parameters": {"generate_parameters": chosen}} for chosen in SUPPORTED]
    for got, chosen in zip(ask(f"{url}/{name}", bodies), SUPPORTED, strict=True):
        assert got == [{key: given.answer(text, **chosen)} for text in asked], chosen


def test_a_length_that_counts_the_prompt_leaves_what_is_left_of_it(url: str, models: Generators) -> None:
    given, chosen = models["gpt2"], {"max_length": 12, "do_sample": False}
    [got] = ask(f"{url}/gpt2", [{"inputs": "small words", "parameters": chosen}])
    assert got == [{"generated_text": given.answer("small words", **chosen)}]
    status, why = refusal(f"{url}/gpt2", {"inputs": "small words", "parameters": {"max_length": 1}})
    assert (status, "max_length" in why) == (422, True)


@pytest.mark.parametrize("name", [*DECODERS, "t5", "bart"])
def test_a_prompt_is_cut_to_so_many_tokens_from_the_left(name: str, url: str, models: Generators) -> None:
    given, text = models[name], "one two three four five six seven eight nine ten"
    given.tokenizer.truncation_side = "left"
    kept = list(given.tokenizer(text, truncation=True, max_length=5)["input_ids"])
    given.tokenizer.truncation_side = "right" if given.model.config.is_encoder_decoder else "left"
    chosen = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    wanted = reference(given.model, kept, GenerationOptions(**chosen))
    body = {"inputs": text, "parameters": {**chosen, "truncate": 5, "details": True}}
    answer = httpx.post(f"{url}/{name}", json=body, timeout=60)
    assert [token["id"] for token in answer.json()[0]["details"]["tokens"]] == wanted
    assert (answer.headers["x-compute-tokens"], answer.headers["x-truncated-inputs"]) == ("5", "1")
    events = streamed(f"{url}/{name}", {**body, "stream": True})
    assert [event["token"]["id"] for event in events] == wanted
    assert events[-1]["details"]["input_length"] == 5


@pytest.mark.parametrize("name", ["t5", "bart", "bart-configured"])
def test_texts_of_texts_are_streamed_as_they_are_answered(name: str, url: str, models: Generators) -> None:
    """The last one searches with beams, as its generation config says, so that all of it comes at the end."""
    body = {"inputs": "☕ small words", "parameters": {"seed": 9, "max_new_tokens": NEW_TOKENS}}
    events = streamed(f"{url}/{name}", {**body, "stream": True})
    [whole] = ask(f"{url}/{name}", [body])
    assert "".join(event["token"]["text"] for event in events) == whole[0]["generated_text"]
    assert events[-1]["generated_text"] == whole[0]["generated_text"]


def test_details_are_refused_where_a_model_searches_with_beams(url: str) -> None:
    status, why = refusal(f"{url}/bart-configured", {"inputs": "a", "parameters": {"details": True}})
    assert (status, "num_beams" in why) == (422, True)


def test_a_translation_begins_with_the_prefix_of_its_languages(url: str, models: Generators) -> None:
    given, text = models["t5-translation"], "The model reads."
    chosen = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    languages = {"fr": "translate English to French: ", "de": "translate English to German: "}
    bodies = [{"inputs": text, "parameters": {**chosen, "src_lang": "en", "tgt_lang": to}} for to in languages]
    for got, prefix in zip(ask(f"{url}/t5-translation", bodies), languages.values(), strict=True):
        assert got == [{"translation_text": given.answer(prefix + text, **chosen)}]
    unknown = {"inputs": text, "parameters": {"src_lang": "en", "tgt_lang": "tlh"}}
    assert "en to fr" in refusal(f"{url}/t5-translation", unknown)[1]


def test_a_language_of_marian_goes_before_the_text(url: str, models: Generators) -> None:
    given, text, chosen = models["marian-pieces"], "the model reads", {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    bodies = [{"inputs": text, "parameters": {**chosen, "tgt_lang": to}} for to in ("fra", "deu")]
    for got, to in zip(ask(f"{url}/marian-pieces", bodies), ("fra", "deu"), strict=True):
        assert got == [{"translation_text": given.answer(f">>{to}<< {text}", **chosen)}]


def test_the_words_of_a_tokenizer_without_a_fast_form_are_refused(url: str) -> None:
    status, why = refusal(f"{url}/marian-pieces/tokenize", {"inputs": "the model"})
    assert status == 422
    assert "fast form" in why


@pytest.mark.parametrize("name", CONFIGURED)
def test_what_is_not_said_is_as_the_models_generation_config_says(name: str, url: str, models: Generators) -> None:
    given, text = models[name], "small words of one line"
    bodies = [{"inputs": text, "parameters": {"seed": 9, **chosen}} for chosen in ({}, {"min_new_tokens": 5})]
    plain, longer = ask(f"{url}/{name}", bodies)
    with configured(given.model, **CONFIGURED[name]):
        assert plain == [{"generated_text": given.answer(text, seed=9)}]
        assert longer == [{"generated_text": given.answer(text, seed=9, min_new_tokens=5)}]


@pytest.mark.parametrize("name", DECODERS)
def test_streamed_pieces_are_the_whole_answer(name: str, url: str, models: Generators) -> None:
    given, text = models[name], "☕ small words"
    for chosen in GREEDY_AND_SEEDED[:4]:
        parameters = {**chosen, "max_new_tokens": 30}
        wanted = given.tokens(text, **parameters)
        events = streamed(f"{url}/{name}", {"inputs": text, "parameters": parameters, "stream": True})
        whole = given.tokenizer.decode(wanted, skip_special_tokens=True)
        assert "".join(event["token"]["text"] for event in events) == whole
        assert [event["token"]["id"] for event in events] == wanted
        assert events[-1]["generated_text"] == whole
        body = {"prompt": text, "max_tokens": 30, "temperature": chosen.get("temperature", 0), "stream": True}
        body |= {key: chosen[key] for key in ("seed", "top_k", "top_p") if key in chosen}
        pieces = streamed(f"{url}/{name}/v1/completions", body)
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole


@pytest.mark.parametrize("text", ["small", "small words " * 100])
def test_a_stream_tells_that_its_prompt_was_cut_as_a_whole_answer_does(text: str, url: str) -> None:
    for path, asked in (
        ("", {"inputs": text, "parameters": {"max_new_tokens": 2, "truncate": True}}),
        ("/v1/completions", {"prompt": text, "max_tokens": 2, "truncate": True}),
    ):
        body: dict[str, Any] = asked
        whole, pieces = (httpx.post(f"{url}/gpt2{path}", json={**body, "stream": stream}) for stream in (False, True))
        assert "event-stream" in pieces.headers["content-type"]
        assert whole.headers["x-truncated-inputs"] == pieces.headers["x-truncated-inputs"] == str(int(len(text) > 9))


def streamed(url: str, body: dict[str, Any]) -> list[Any]:
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data:").strip() for line in response.iter_lines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


ASKED = [{"role": "user", "content": "small?"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "small wor"}]


@pytest.mark.parametrize("messages", [ASKED, BEGUN], ids=["a turn", "a final message"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_conversation_is_gone_on_with_as_by_the_pipeline(
    name: str, messages: Any, url: str, models: Generators
) -> None:
    given = models[name]
    pipe = pipeline("text-generation", model=given.model, tokenizer=given.tokenizer, device="cpu")
    ends = [given.model.generation_config.eos_token_id, given.tokenizer.eos_token_id]
    [reference_answer] = pipe(messages, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends)
    *_, last = reference_answer["generated_text"]
    body = {"messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
    [whole] = ask(f"{url}/{name}/v1/chat/completions", [body])
    begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    assert begun + whole["choices"][0]["message"]["content"] == last["content"]


def test_several_answers_are_those_of_the_next_seeds(url: str, models: Generators) -> None:
    given, sampled = models["gpt2"], {"max_new_tokens": 8, "do_sample": True, "temperature": 1.0}
    wanted = [given.answer("small words", **sampled, seed=seed) for seed in (5, 6, 7)]
    assert len(set(wanted)) == 3
    body = {"prompt": ["small words", "other words"], "max_tokens": 8, "temperature": 1.0, "seed": 5, "n": 3}
    [whole] = ask(f"{url}/gpt2/v1/completions", [body])
    assert [choice["text"] for choice in whole["choices"][:3]] == wanted
    assert [choice["text"] for choice in whole["choices"][3:]] == [
        given.answer("other words", **sampled, seed=seed) for seed in (5, 6, 7)
    ]
    assert whole["usage"]["completion_tokens"] == 48
    prompts = sum(len(given.prompt(text)) for text in body["prompt"])  # type: ignore[union-attr]
    assert whole["usage"]["prompt_tokens"] == prompts
    told = dict.fromkeys(range(3), "")
    ends = []
    body |= {"prompt": "small words", "stream_options": {"include_usage": True}, "echo": True}
    *events, usage = streamed(f"{url}/gpt2/v1/completions", {**body, "stream": True})
    for [choice] in (event["choices"] for event in events):
        told[choice["index"]] += choice["text"]
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert [*told.values()] == [f"small words{text}" for text in wanted]
    assert sorted(ends) == [0, 1, 2]
    assert usage["usage"]["completion_tokens"] == 24


def test_a_chat_ends_at_the_tokenizers_end_of_turn_and_a_text_at_the_models_alone(url: str, models: Generators) -> None:
    """The generation config ends answers at another token."""
    given = models["gpt2"]
    turn_end = given.tokenizer.eos_token_id
    assert given.model.generation_config.eos_token_id != turn_end
    forced = {"max_tokens": 5, "temperature": 0, "logit_bias": {str(turn_end): 1000}}
    chat, text = f"{url}/gpt2/v1/chat/completions", f"{url}/gpt2/v1/completions"
    [ended, goes_on] = ask(chat, [{"messages": ASKED, **forced, **more} for more in ({}, {"ignore_eos": True})])
    assert (ended["usage"]["completion_tokens"], ended["choices"][0]["finish_reason"]) == (1, "stop")
    assert (goes_on["usage"]["completion_tokens"], goes_on["choices"][0]["finish_reason"]) == (5, "length")
    [plain, stopped, by_id] = ask(
        text,
        [{"prompt": "small", **forced, **more} for more in ({}, {"stop": ["</s>"]}, {"stop_token_ids": [turn_end]})],
    )
    assert plain["usage"]["completion_tokens"] == 5
    for answer in (stopped, by_id):
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (1, "stop")


def test_a_conversation_that_is_too_long_is_refused_unless_a_cut_is_asked_for(url: str, models: Generators) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "small words " * 100}]
    for path, body in (("chat/completions", {"messages": messages}), ("completions", {"prompt": "small words " * 100})):
        answer = httpx.post(f"{url}/gpt2/v1/{path}", json={**body, "max_tokens": 4}, timeout=60)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] == f"{next(iter(body))}[0]"
        cut = httpx.post(f"{url}/gpt2/v1/{path}", json={**body, "max_tokens": 4, "truncate": True}, timeout=60)
        assert (cut.status_code, cut.headers["x-truncated-inputs"]) == (200, "1")


def test_log_probabilities_stay_inside_the_text(url: str, models: Generators) -> None:
    given = models["gpt2"]
    body = {"prompt": "a ☕", "max_tokens": 40, "temperature": 1.5, "seed": 3, "logprobs": 5, "stop": "e"}
    [whole] = ask(f"{url}/gpt2/v1/completions", [body])
    [choice] = whole["choices"]
    told = choice["logprobs"]
    assert max(told["text_offset"]) <= len(choice["text"])
    assert told["text_offset"] == sorted(told["text_offset"])
    for token, own, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert top[token] >= own
    chat = {"messages": ASKED, "max_tokens": 40, "temperature": 1.5, "seed": 3, "logprobs": True}
    [answered] = ask(f"{url}/gpt2/v1/chat/completions", [chat])
    content = answered["choices"][0]["logprobs"]["content"]
    spelled = b"".join(bytes(each["bytes"]) for each in content)
    assert answered["choices"][0]["message"]["content"] in spelled.decode(errors="replace")
    assert given.tokenizer.decode(given.tokenizer("☕")["input_ids"]) == "☕"


@pytest.mark.parametrize("name", DECODERS)
def test_a_conversation_is_answered_as_its_template_says(name: str, url: str, models: Generators) -> None:
    given = models[name]
    messages = [{"role": "user", "content": "a ☕?"}, {"role": "assistant", "content": "b"}, *ASKED]
    ids = given.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    body = {"messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
    [whole] = ask(f"{url}/{name}/v1/chat/completions", [body])
    wanted = reference(given.model, ids, GenerationOptions(max_new_tokens=NEW_TOKENS, do_sample=False))
    text = given.tokenizer.decode(wanted, skip_special_tokens=True)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": text}
    assert whole["usage"]["prompt_tokens"] == len(ids)
    events = streamed(f"{url}/{name}/v1/chat/completions", {**body, "stream": True})
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == text


def test_a_stop_text_ends_what_generate_would_go_on_with(url: str, models: Generators) -> None:
    given, chosen = models["gpt2"], {"max_new_tokens": 30, "do_sample": True, "seed": 5, "temperature": 1.0}
    whole = given.answer("small words", **chosen)
    stop = whole[8:10]
    [got] = ask(f"{url}/gpt2", [{"inputs": "small words", "parameters": {**chosen, "stop": [stop, "never there"]}}])
    assert got == [{"generated_text": whole[: whole.index(stop)]}]


def test_log_probabilities_are_the_models_own(url: str, models: Generators) -> None:
    given = models["llama"]
    chosen = {"max_new_tokens": 6, "do_sample": False}
    [[told]] = ask(f"{url}/llama", [{"inputs": ["a"], "parameters": {**chosen, "details": True, "top_n_tokens": 3}}])
    body = {"prompt": "a", "max_tokens": 6, "temperature": 0, "logprobs": 0}
    [openai] = ask(f"{url}/llama/v1/completions", [body])
    prompt, tokens = given.prompt("a"), given.tokens("a", **chosen)
    with torch.inference_mode():
        chances = given.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    own = [float(chances[step, token]) for step, token in enumerate(tokens)]
    assert [token["logprob"] for token in told["details"]["tokens"]] == pytest.approx(own, abs=TOLERANCE)
    assert openai["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(own, abs=TOLERANCE)
    for top, step in zip(told["details"]["top_tokens"], chances, strict=True):
        assert [token["id"] for token in top] == step.topk(3).indices.tolist()
        assert [token["logprob"] for token in top] == pytest.approx(step.topk(3).values.tolist(), abs=TOLERANCE)


def test_what_cannot_be_answered_is_refused_with_the_reason(url: str) -> None:
    status, why = refusal(f"{url}/gpt2", {"inputs": ["a", ""]})
    assert (status, why) == (422, "inputs[1]: has no tokens; send a text that is not empty")
    assert ask(f"{url}/llama", [{"inputs": ""}])  # its tokenizer begins a text with a special token
    for name in ("gpt2", "t5"):
        status, why = refusal(f"{url}/{name}", {"inputs": "small words " * 100, "parameters": {"truncate": False}})
        assert status == 422
        assert "tokens" in why
        status, why = refusal(f"{url}/{name}", {"inputs": "a", "parameters": {"long_texts": "windows"}})
        assert "windows" in why
