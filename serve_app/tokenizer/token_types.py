"""Which token types an input has, as transformers gives them to the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from serve_app.errors import InvalidInputError
from serve_app.tasks.stock_tokenizer import StockTokenizer
from serve_app.types import TokenizeRequest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TypesT = TypeVar("TypesT")


class TokenTypes:
    """Never changed after construction, so that threads may share it."""

    def __init__(self, tokenizer: Tokenizer, stock: StockTokenizer) -> None:
        single, pair = (max(each.type_ids) for each in tokenizer.encode_batch(["a", ("a", "a")]))
        self._of_texts = stock.gives_token_types and single > 0
        self._of_pairs = stock.gives_token_types and pair > 0
        self.refusal = _refusal(stock.token_types, pair) if self._of_pairs else None
        """Why the model cannot be given pairs; None where it can."""

    def of(self, request: TokenizeRequest, index: int, type_ids: TypesT) -> TypesT | None:
        """The types of one input's tokens, where the tokenizer says `type_ids`; None where all are zero.

        Raises InvalidInputError for a pair that the model has no types for.
        """
        if not isinstance(request.inputs[index], tuple):
            return type_ids if self._of_texts else None
        if self.refusal is not None and request.computed:
            raise InvalidInputError(f"inputs[{index}]: {self.refusal}")
        return type_ids if self._of_pairs else None


def _refusal(known: int | None, highest: int) -> str | None:
    if known is None or highest < known:
        return None
    return (
        f"the tokenizer gives the second text of a pair token type {highest}, and the model knows only {known} (its "
        "type_vocab_size). If the model was trained on pairs without types, save its tokenizer with model_input_names "
        "that leave out token_type_ids"
    )
