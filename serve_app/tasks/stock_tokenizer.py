"""A model's tokenizer as transformers makes it of the model's files, which decides what its tokens are.

What the classes of transformers declare beside `tokenizer.json` (lower-casing, special tokens, the inputs of the model,
the side of padding) has no other place to be read from. Reading it takes torch into the process, some 250 MB, so that a
process which has not loaded transformers lets another one do it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from serve_app.errors import IncompleteModelError
from serve_app.tasks.sentence_files import options_of, read_chain, transformer_folder
from serve_app.types import ModelCard, Side

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from serve_app.tasks.stock_tokenizer import main; main()"
)

_CHILD_TIMEOUT_S = 300.0

_BASES = frozenset({"PreTrainedTokenizerBase", "PythonBackend", "TokenizersBackend"})

_NAMED_NONE_IN_4 = frozenset({"AlbertTokenizer", "HerbertTokenizer", "RemBertTokenizer", "SplinterTokenizer"})
"""Classes that name their inputs in transformers 5.23, without token types, and named none in 4.57.6."""

_MOST_REASON = 300
"""Characters of what went wrong that are told."""


@dataclass(frozen=True, slots=True)
class StockTokenizer:
    """What transformers' tokenizer of a model says."""

    definition: str | None
    """The JSON of a `tokenizer.json` without padding and truncation; None where the tokenizer has no fast form."""
    gives_token_types: bool
    """Whether the model is given token types, which its class may take although transformers gives it none."""
    gave_token_types: bool
    """The same in transformers 4.57, whose pipeline answers to questions follow."""
    padding_side: Side
    truncation_side: Side
    cleans_up: bool
    """`clean_up_tokenization_spaces`, which transformers' `decode` follows."""
    cls_token_id: int | None
    mask_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    turn_end_ids: list[int]
    """Tokens that end a turn of a conversation, whatever the generation config says."""
    token_types: int | None
    """How many token types the model has a table for; None where it has none, or takes any."""

    def answering(self, task: str) -> StockTokenizer:
        """As it is for a model that is served for `task`."""
        return replace(self, gives_token_types=self.gave_token_types) if task == "question-answering" else self

    def completed(self, card: ModelCard) -> ModelCard:
        """The card, with what only the tokenizer knows. A tokenizer that cuts on the right is as good as one that says
        nothing, as transformers does not tell them apart.
        """
        side = card.truncation_side or ("left" if self.truncation_side == "left" else None)
        return replace(
            card,
            truncation_side=side,
            padding_side=self.padding_side,
            cls_token_id=self.cls_token_id,
            mask_token_id=self.mask_token_id,
            turn_end_ids=tuple(self.turn_end_ids),
        )


def read_stock_tokenizer(path: Path, *, here: bool = False) -> StockTokenizer:
    """What the tokenizer of the model in `path` says. Takes seconds where transformers is not loaded.

    `here` is for a process that is about to load transformers in any case. Raises IncompleteModelError if no tokenizer
    can be made of the files.
    """
    if here or "transformers" in sys.modules:
        return _described(path)
    arguments = [sys.executable, "-c", _CHILD, json.dumps(sys.path), str(path)]
    try:
        child = subprocess.run(arguments, capture_output=True, text=True, timeout=_CHILD_TIMEOUT_S, check=True)
        answer = json.loads(child.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        told = getattr(error, "stderr", None) or str(error)
        raise _impossible(path, f"the process that reads it failed: {str(told)[-_MOST_REASON:]}") from error
    if "error" in answer:
        raise IncompleteModelError(answer["error"])
    return StockTokenizer(**answer)


def main() -> None:
    """In a process of its own: the description of a tokenizer as JSON, on the last line of stdout."""
    try:
        answer = asdict(_described(Path(sys.argv[2])))
    except IncompleteModelError as error:
        answer = {"error": error.message}
    print(f"\n{json.dumps(answer)}")


def load_stock_tokenizer(path: Path) -> Any:
    """The tokenizer of the model in `path`, an object of transformers; nothing is requested from any network.

    Lower-cases where sentence-transformers is asked to (`do_lower_case` of sentence_bert_config.json), by its rule.
    Raises IncompleteModelError if none can be made.
    """
    from transformers import AutoTokenizer

    folder = transformer_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers reads files of many kinds, and raises what their readers raise
        raise _impossible(folder, f"{type(error).__name__}: {error}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Without any vocabulary file transformers makes a tokenizer that knows its special tokens only.
    if backend is not None and backend.get_vocab_size() <= len(backend.get_added_tokens_decoder()):
        raise _impossible(folder, "no vocabulary is among them")
    if read_chain(path).modules and options_of(folder).get("do_lower_case"):
        _lower_case(tokenizer, backend)
    return tokenizer


def _lower_case(tokenizer: Any, backend: Any) -> None:
    """As `Transformer` of sentence-transformers 6.2 does (base/modules/transformer.py)."""
    from tokenizers.normalizers import Lowercase, Sequence

    if backend is None:
        with suppress(AttributeError):
            tokenizer.do_lower_case = True
        return
    found = backend.normalizer
    parts: list[Any] = [] if found is None else [found]
    if isinstance(found, Sequence):
        parts = [found[place] for place in range(len(found))]
    if not any(isinstance(part, Lowercase) for part in parts):
        backend.normalizer = Sequence([Lowercase(), *parts])


def _described(path: Path) -> StockTokenizer:
    from transformers import AutoConfig

    tokenizer = load_stock_tokenizer(path)
    folder = str(transformer_folder(path))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError):  # whoever loads the model tells of it
        config = None
    types = getattr(config, "type_vocab_size", None)
    return StockTokenizer(
        definition=_definition(tokenizer),
        gives_token_types="token_type_ids" in tokenizer.model_input_names,
        gave_token_types=_gave_token_types(tokenizer),
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        cleans_up=bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)),
        cls_token_id=tokenizer.cls_token_id,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        unk_token_id=tokenizer.unk_token_id,
        turn_end_ids=_turn_end_ids(tokenizer),
        token_types=types if isinstance(types, int) and types > 0 else None,
    )


def _turn_end_ids(tokenizer: Any) -> list[int]:
    """Of `eos_token` and `eot_token`, as far as the tokenizer has them."""
    eot = tokenizer.init_kwargs.get("eot_token")
    content = eot.get("content") if isinstance(eot, dict) else eot
    named = tokenizer.get_added_vocab().get(str(content)) if content is not None else None
    return sorted({i for i in (tokenizer.eos_token_id, named) if i is not None})


def _gave_token_types(tokenizer: Any) -> bool:
    """In transformers 4 classes that named no inputs of their own gave token types; in version 5 they give none."""
    if "model_input_names" in tokenizer.init_kwargs:
        return "token_type_ids" in tokenizer.model_input_names
    owner: Any = next(cls for cls in type(tokenizer).__mro__ if "model_input_names" in vars(cls))
    named_none = owner.__name__ in _BASES or owner.__name__ in _NAMED_NONE_IN_4
    return named_none or "token_type_ids" in owner.model_input_names


def _definition(tokenizer: Any) -> str | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    backend.no_padding()
    backend.no_truncation()
    try:
        written: str = backend.to_str()
    except Exception as error:  # tokenizers raises a bare Exception for parts that are written in Python
        raise IncompleteModelError(
            f"{tokenizer.name_or_path}: its tokenizer has a part in Python ({error}), which is not supported"
        ) from error
    return written


def _impossible(folder: Path, reason: str) -> IncompleteModelError:
    why = " ".join(reason.split())[:_MOST_REASON]
    return IncompleteModelError(f"{folder.name}: no tokenizer can be made from the model's files: {why}")
