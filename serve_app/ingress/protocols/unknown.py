"""What becomes of fields that a body does not have: one rule for every route.

A value that changes nothing is accepted; any other is refused by the field's name, so that nothing that a client asks
for is dropped without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from serve_app.errors import InvalidInputError
from serve_app.options import OPTION_NAME

HARMLESS = frozenset(
    (
        "cache_salt",
        "metadata",
        "options",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "user",
    )
)
"""Fields that never change an answer: labels for the provider's own books, and hints about its caches."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # transformers' `generate` and pipelines
    "num_return_sequences": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "use_cache": (True,),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "clean_up_tokenization_spaces": (False,),
    "return_text": (True,),
    "do_sample": (False,),
    "num_beams": (1,),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_logits", "output_scores"), (False,)),
    **dict.fromkeys(("return_dict_in_generate", "return_tensors", "remove_invalid_values", "token_healing"), (False,)),
    # OpenAI
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "suffix": ("",),
    "logit_bias": ({},),
    "echo": (False,),
    "stream": (False,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "parallel_tool_calls": (True, False),
    "verbosity": ("medium",),
    "modalities": ([], ["text"]),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "annotations": ([],),
    "include_obfuscation": (False,),
    # vLLM and Text Generation Inference
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "include_reasoning": (True,),
    "continuous_usage_stats": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "priority": (0,),
    "watermark": (False,),
    "decoder_input_details": (False,),
    # clients of other servers of embeddings, and MLServer's for the Open Inference Protocol
    "content_type": ("str", "np"),
    "late_chunking": (False,),
    "return_embeddings": (False,),
    "embedding_type": ("float",),
    "embedding_types": (["float"],),
}
"""Values that change nothing, by field. Null changes nothing in any field."""


def refuse(
    unknown: Mapping[str, Any], known: Iterable[str], where: str = "", neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL
) -> None:
    """Raises InvalidInputError for the first field of `unknown` that asks for something, with the names of `known`.

    `where` is the part of the request that has the fields, empty for the body itself.
    """
    for name, value in unknown.items():
        if value is None or name in HARMLESS or value in neutral.get(name, NEUTRAL.get(name, ())):
            continue
        raise refusal(name, known, where)


def refusal(name: str, known: Iterable[str], where: str = "") -> InvalidInputError:
    """What is wrong with a field that is not supported, and which are."""
    place = f"{where}." if where else ""
    supported = f"supported are: {', '.join(sorted(known))}"
    if OPTION_NAME.fullmatch(name):
        return InvalidInputError(f"`{place}{name}`: is not supported here; leave it out. {supported.capitalize()}")
    part = f"`{where}` has" if where else "the body has"
    return InvalidInputError(f"{part} a field whose name is not known here; leave it out. {supported.capitalize()}")
