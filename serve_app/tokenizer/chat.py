"""Conversations as one text, by the model's own chat template."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve_app.errors import InvalidInputError
from serve_app.options import OPTION_NAME
from serve_app.tasks.card import has_chat_template
from serve_app.tasks.stock_tokenizer import load_stock_tokenizer
from serve_app.types import Chat


class ChatTemplate:
    """The template of the tokenizer in `folder`, loaded when first needed; may be used from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._exists = has_chat_template(folder)
        self._tokenizer: Any = None
        self._loading = threading.Lock()

    def load(self) -> None:
        """What the first conversation would have to wait for."""
        with self._loading:
            if self._tokenizer is None and self._exists:
                self._tokenizer = load_stock_tokenizer(self._folder)

    def render(self, chat: Chat) -> str:
        """The conversation up to where the model's answer begins.

        Raises InvalidInputError if the model has no template, or its template refuses the conversation or does not
        read one of its variables.
        """
        from jinja2 import TemplateError

        if not self._exists:
            raise InvalidInputError("the model has no chat template; send one text as prompt instead of messages")
        self.load()
        messages = [{"role": message.role, "content": message.content, **message.fields} for message in chat.messages]
        variables = self._read_by_template(chat.variables) if chat.variables else {}
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=chat.begins_turn,
                continue_final_message=chat.continues,
                **variables,
            )
        except TemplateError as error:
            raise InvalidInputError(f"messages: the model's chat template does not take them: {error}") from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            # Of what transformers and Python say only the kind is told: their words may repeat the conversation.
            if chat.continues and isinstance(error, ValueError):
                raise InvalidInputError(
                    "continue_final_message: the model's chat template changes the final message or leaves it out, so "
                    "that it cannot be continued; send continue_final_message: false"
                ) from error
            kind = type(error).__name__
            raise InvalidInputError(f"messages: the model's chat template does not take them ({kind})") from error
        return str(text)

    def _read_by_template(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        """The variables that the template reads. Raises InvalidInputError for another one, unless it says nothing."""
        from transformers.utils.chat_template_utils import _compile_jinja_template, _get_template_variables

        template = self._tokenizer.get_chat_template()
        given = inspect.signature(self._tokenizer.apply_chat_template).parameters.keys() - {"documents"}
        made = {"messages", *given, *_compile_jinja_template(template).environment.globals}
        read = _get_template_variables(template) - made
        for name, value in variables.items():
            if value is None or name in read or (value is False and name not in made):
                continue
            what = f"`{name}`" if OPTION_NAME.fullmatch(name) else "a variable of that name"
            raise InvalidInputError(
                f"chat_template_kwargs: the model's chat template does not read {what}; leave it out. It reads: "
                f"{', '.join(sorted(read)) or 'none'}"
            )
        return {name: value for name, value in variables.items() if name in read and value is not None}
