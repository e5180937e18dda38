"""Conversations as one text, by the model's own chat template."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from serve_app.errors import InvalidInputError
from serve_app.tasks.card import has_chat_template
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
                from transformers import AutoTokenizer

                self._tokenizer = AutoTokenizer.from_pretrained(
                    str(self._folder), local_files_only=True, trust_remote_code=False
                )

    def render(self, chat: Chat) -> str:
        """The conversation up to where the model's answer begins.

        Raises InvalidInputError if the model has no template, or its template refuses the conversation.
        """
        from jinja2 import TemplateError

        if not self._exists:
            raise InvalidInputError("the model has no chat template; send one text as prompt instead of messages")
        self.load()
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise InvalidInputError(f"the model's chat template does not take these messages: {error}") from error
        return str(text)
