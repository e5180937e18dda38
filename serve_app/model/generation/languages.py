"""Source and target languages of models that know many, by the tokens that stand for languages."""

from __future__ import annotations

from typing import Any

from serve_app.errors import InvalidInputError
from serve_app.model.generation.text import Decoder
from serve_app.options import GenerationOptions


def in_language(
    input_ids: tuple[int, ...],
    options: GenerationOptions,
    words: Decoder,
    special: frozenset[int],
    plain: frozenset[int],
) -> tuple[int, ...]:
    """The ids with the source language's token where the tokenizer put that of its default language.

    `plain` are special tokens that mean no language (end, padding). Raises InvalidInputError.
    """
    if options.source_language is None:
        return input_ids
    wanted = language_token(options.source_language, words, "source_language")
    places = [i for i in (0, len(input_ids) - 1) if input_ids[i] in special - plain]
    if not places:
        raise InvalidInputError("source_language: this model's texts carry no token for a language")
    return tuple(wanted if i == places[0] else token for i, token in enumerate(input_ids))


def set_target(config: Any, options: GenerationOptions, words: Decoder) -> None:
    """Make the answer begin with the target language's token. Raises InvalidInputError."""
    if options.target_language is not None:
        config.forced_bos_token_id = language_token(options.target_language, words, "target_language")


def language_token(language: str, words: Decoder, field: str) -> int:
    """The token of a language, written as in the model's vocabulary (`fra_Latn`, `en_XX`, or `en` for `__en__`)."""
    for name in (language, f"__{language}__"):
        found = words.token_to_id(name)
        if found is not None:
            return found
    raise InvalidInputError(f"{field}: the model's vocabulary has no token for this language")
