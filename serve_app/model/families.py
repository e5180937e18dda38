"""Which model families are packed, and for each other one why it is not.

PACKED is what the tests prove: tiny random models of each, packed and padded, give the same answers, whoever their
neighbours are. A family that is in neither table is not packed: a difference that load-time probes do not show would be
a leak between requests.
"""

from __future__ import annotations

from collections.abc import Mapping

PACKED = frozenset(
    {
        "albert",
        "bart",
        "bert",
        "camembert",
        "distilbert",
        "electra",
        "ernie",
        "eurobert",
        "gpt2",
        "jina_embeddings_v3",
        "llama",
        "marian",
        "mbart",
        "mistral",
        "modernbert",
        "mpnet",
        "mt5",
        "nomic_bert",
        "pegasus",
        "qwen2",
        "qwen3",
        "roberta",
        "t5",
        "umt5",
        "xlm-roberta",
        "xlm-roberta-xl",
    }
)

NOT_BEHIND_INTERFACE = "its attention is not behind transformers' attention interface"

FALLBACK: Mapping[str, str] = {
    "big_bird": "block-sparse attention over the padded length",
    "bloom": "alibi biases are made from the padded mask",
    "convbert": "its convolutions read the neighbouring tokens of the row",
    "deberta": "disentangled attention projects its relative positions once per forward pass, not per sequence",
    "deberta-v2": "disentangled attention projects its relative positions once per forward pass, not per sequence",
    "esm": "rescales embeddings by the share of masked tokens in a row",
    "falcon": "alibi biases are made from the padded mask",
    "fnet": "Fourier transforms mix all tokens of a row",
    "gpt_neo": NOT_BEHIND_INTERFACE,
    "longformer": "sliding-window attention over chunks of the padded length",
    "luke": NOT_BEHIND_INTERFACE,
    "megatron-bert": NOT_BEHIND_INTERFACE,
    "mobilebert": "embeds each token together with its neighbours in the row",
    "rembert": NOT_BEHIND_INTERFACE,
    "roformer": NOT_BEHIND_INTERFACE,
    "tapas": NOT_BEHIND_INTERFACE,
    "xlnet": "relative positions and memories over the padded length",
}


def why_not_packed(model_type: str) -> str | None:
    """The reason why a family is not packed, or None if it is."""
    if model_type in PACKED:
        return None
    return FALLBACK.get(model_type, f"the family {model_type!r} is not among those that tests prove")
