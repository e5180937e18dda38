"""Models that generate, over real HTTP: whole answers, pieces, conversations; each as `generate` makes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.live import Live, application_of, served
from tests.model.generation.models import tiny, tokenizer

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def save(model_type: str, folder: Path) -> Path:
    tiny(model_type).save_pretrained(folder)
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), model_max_length=64, **SPECIAL)
    saved.chat_template = TEMPLATE
    saved.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama", "t5")}


@pytest.fixture(scope="module")
def live(folders: dict[str, Path]) -> Iterator[Live]:
    def generating(config: dict[str, Any]) -> None:
        models = [{"name": name, "source": str(folder)} for name, folder in folders.items()]
        config["applications"][1:] = [application_of(config, model) for model in models]

    with served(generating) as running:
        yield running


def expected(folder: Path, text: str, **options: Any) -> str:
    words = AutoTokenizer.from_pretrained(folder)
    cls = AutoModelForSeq2SeqLM if "t5" in folder.name else AutoModelForCausalLM
    model = cls.from_pretrained(folder).eval()
    ids = words(text, return_tensors="pt").input_ids
    if "seed" in options:
        torch.manual_seed(options.pop("seed"))
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
    new = output[1:] if model.config.is_encoder_decoder else output[ids.shape[1] :]
    return str(words.decode(new, skip_special_tokens=True))


def complete(live: Live, **body: Any) -> Any:
    answer = httpx.post(f"{live.base_url}/v1/completions", json={"model": "llama", **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_concurrent_completions_are_those_of_generate(live: Live, folders: dict[str, Path]) -> None:
    texts = [f"the model number {i} reads" for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(complete, live, prompt=text, max_tokens=5 + 3 * i, temperature=0)
            for i, text in enumerate(texts)
        ]
        got = [one.result()["choices"][0]["text"] for one in asked]
    wanted = [
        expected(folders["llama"], text, max_new_tokens=5 + 3 * i, do_sample=False) for i, text in enumerate(texts)
    ]
    assert got == wanted


def test_a_seed_gives_the_tokens_of_generate(live: Live, folders: dict[str, Path]) -> None:
    got = complete(live, prompt="one two", max_tokens=20, temperature=0.8, seed=11)["choices"][0]["text"]
    chosen = {"do_sample": True, "temperature": 0.8}
    assert got == expected(folders["llama"], "one two", max_new_tokens=20, seed=11, **chosen)


def test_pieces_that_are_streamed_make_the_whole(live: Live) -> None:
    body = {"model": "llama", "prompt": "one two three", "max_tokens": 30, "temperature": 0}
    whole = complete(live, **body)["choices"][0]["text"]
    url = f"{live.base_url}/v1/completions"
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as answer:
        assert answer.status_code == 200
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
    pieces = [json.loads(event)["choices"][0]["text"] for event in events]
    assert "".join(pieces) == whole
    assert len(pieces) > 1


def test_a_conversation_goes_through_the_template(live: Live, folders: dict[str, Path]) -> None:
    body = {
        "model": "llama",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    answer = httpx.post(f"{live.base_url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    words = AutoTokenizer.from_pretrained(folders["llama"])
    text = words.apply_chat_template(body["messages"], tokenize=False)
    model = AutoModelForCausalLM.from_pretrained(folders["llama"]).eval()
    ids = words(text, return_tensors="pt", add_special_tokens=False).input_ids
    ends = [i for i in (model.generation_config.eos_token_id, words.eos_token_id) if i is not None]
    with torch.inference_mode():
        new = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=ends or None
        )
    wanted = words.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.json()["choices"][0]["message"]["content"] == wanted


@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_decoder_answers_as_generate_does(live: Live, folders: dict[str, Path], beams: int) -> None:
    body = {"inputs": "the model reads a long line", "parameters": {"max_new_tokens": 12, "num_beams": beams}}
    answer = httpx.post(f"{live.base_url}/models/t5", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    wanted = expected(folders["t5"], body["inputs"], max_new_tokens=12, num_beams=beams, do_sample=False)
    told = answer.json()
    assert (told[0] if isinstance(told, list) else told)["generated_text"] == wanted


def test_a_prompt_that_is_too_long_is_refused_unless_a_cut_is_asked_for(live: Live) -> None:
    body: dict[str, Any] = {"inputs": "word " * 500, "parameters": {"max_new_tokens": 5}}
    answer = httpx.post(f"{live.base_url}/models/llama", json=body, timeout=60)
    assert answer.json()["code"] == "input_too_long"
    body["parameters"] = {"max_new_tokens": 5, "truncate": True}
    assert httpx.post(f"{live.base_url}/models/llama", json=body, timeout=60).status_code == 200
    body["parameters"] = {"max_new_tokens": 5, "long_texts": "windows"}
    refused = httpx.post(f"{live.base_url}/models/llama", json=body, timeout=60)
    assert (refused.status_code, "windows" in refused.text) == (422, True)
