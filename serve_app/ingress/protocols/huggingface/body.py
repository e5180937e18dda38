"""What the bodies of all tasks share: one text or several, and what becomes of long ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainValidator, ValidationInfo, WithJsonSchema

from serve_app.errors import EmptyInputError
from serve_app.ingress.encoding import encode
from serve_app.ingress.protocols.fields import (
    TEXT_SCHEMA,
    InferenceBody,
    check_count,
    items_schema,
    text,
)
from serve_app.types import Answer, Request, TextInput


class TaskBody(InferenceBody):
    """A body of one of the tasks, and how its answer is written."""

    @abstractmethod
    def write(self, request: Request, answer: Answer) -> bytes:
        """The JSON of the answer."""


@dataclass(frozen=True, slots=True)
class Several:
    """Inputs, and whether the client sent a list of them or just one; the answer is of the same shape."""

    values: tuple[TextInput, ...]
    is_list: bool

    def encode(self, answers: Sequence[Any]) -> bytes:
        """The answers, one for each input."""
        return encode(list(answers) if self.is_list else answers[0])


@dataclass(frozen=True, slots=True)
class SeveralReader:
    """Reads one thing or a list of such things. Raises EmptyInputError or MalformedRequestError."""

    one: Callable[[Any, str], TextInput]

    def __call__(self, value: Any, info: ValidationInfo) -> Several:
        name = info.field_name or "inputs"
        if type(value) is not list:
            return Several((self.one(value, name),), is_list=False)
        if not value:
            raise EmptyInputError(f"`{name}` is empty; send at least one text")
        check_count(value, info)
        return Several(tuple(self.one(item, f"{name}[{index}]") for index, item in enumerate(value)), is_list=True)


def several_schema(one: dict[str, Any], description: str) -> dict[str, Any]:
    return {"description": description, "anyOf": [one, items_schema(one)]}


Texts = Annotated[
    Several,
    PlainValidator(SeveralReader(text)),
    WithJsonSchema(several_schema(TEXT_SCHEMA, "A text, or a list of texts.")),
]
