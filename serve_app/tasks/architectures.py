"""What a model is for, by the classes that its config.json names in `architectures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.config import ModelConfig, TaskName
from serve_app.errors import ConfigError

_CLASSIFIES = ("ForSequenceClassification",)
_GENERATES = ("ForCausalLM", "GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "XLNetLMHeadModel")
_TRANSLATES = ("MarianMTModel", "M2M100ForConditionalGeneration", "FSMTForConditionalGeneration")
_REWRITES = ("ForConditionalGeneration", *_TRANSLATES)
_FILLS = ("ForMaskedLM", "FlaubertWithLMHeadModel", "XLMWithLMHeadModel")

NEEDED: Mapping[TaskName, tuple[str, ...]] = {
    "sparse-embedding": _FILLS,
    "fill-mask": _FILLS,
    "text-classification": _CLASSIFIES,
    "rerank": _CLASSIFIES,
    "zero-shot-classification": _CLASSIFIES,
    "token-classification": ("ForTokenClassification",),
    "question-answering": ("ForQuestionAnswering", "ForQuestionAnsweringSimple"),
    "text-generation": _GENERATES,
    "text2text-generation": _REWRITES,
    "summarization": _REWRITES,
    "translation": _REWRITES,
}
"""How the names of the classes end that a task needs; `embedding` takes the base model of any."""

_OTHER_INPUTS = ("vision_config", "audio_config", "speech_config", "image_config", "video_config")
"""Parts of a config.json that read something else than text."""

_OF_ONE_CLASS: tuple[TaskName, ...] = ("token-classification", "fill-mask", "question-answering", "text-generation")


def task_of(architectures: Sequence[str], num_labels: int) -> TaskName:
    """The task that a model of these classes is for; `embedding` where they name no head."""
    for name in architectures:
        if name.endswith(_CLASSIFIES):
            return "rerank" if num_labels == 1 else "text-classification"
        if name.endswith(_TRANSLATES):
            return "translation"
        for task in _OF_ONE_CLASS:
            if name.endswith(NEEDED[task]):
                return task
        if name.endswith(_REWRITES):
            return "summarization" if name.startswith("Pegasus") else "text2text-generation"
    return "embedding"


def check_task(config: ModelConfig, task: TaskName, model: Mapping[str, Any]) -> None:
    """Raises ConfigError if the model has no head for its task; a config.json without architectures is believed."""
    architectures = architectures_of(model)
    needed = NEEDED.get(task)
    if needed is None or not architectures or any(name.endswith(needed) for name in architectures):
        return
    raise ConfigError(
        f"models.{config.name}.task: {task} needs a model whose architecture is …{' or …'.join(needed)}; config.json "
        f"says {', '.join(architectures)}, which is for {task_of(architectures, len(labels_of(model)))}. "
        "Set the task to that or leave it out"
    )


def check_reads_text(where: str, model: Mapping[str, Any]) -> None:
    """Raises ConfigError for a model that reads images or sound beside texts, whatever it is to be served for."""
    parts = [key for key in _OTHER_INPUTS if isinstance(model.get(key), dict)]
    if parts:
        named = ", ".join(architectures_of(model)) or str(model.get("model_type"))
        raise ConfigError(
            f"{where}: {named} is a multimodal model (config.json has {', '.join(parts)}), which is not supported for "
            "any task. Serve a model of the same family that reads texts alone"
        )


def architectures_of(model: Mapping[str, Any]) -> tuple[str, ...]:
    """`architectures` of a config.json; empty where it has none."""
    return tuple(str(name) for name in model.get("architectures") or ())


def labels_of(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes by index; without `id2label`, those that transformers makes up (two by default)."""
    named = model.get("id2label")
    if isinstance(named, dict) and named:
        return tuple(str(named[key]) for key in sorted(named, key=int))
    return tuple(f"LABEL_{i}" for i in range(int(model.get("num_labels") or 2)))
