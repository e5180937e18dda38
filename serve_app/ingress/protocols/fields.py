"""Fields that the bodies of several protocols have, decided once."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic.config import JsonDict

from serve_app.config import MOST_INPUTS
from serve_app.errors import BatchTooLargeError, EmptyInputError, MalformedRequestError
from serve_app.ingress.protocols.unknown import refuse
from serve_app.options import DEFAULT_TEMPLATE, TaskOptions
from serve_app.types import LongTexts, Request, Side, TextInput, TokenIds

MOST_TOKEN_IDS = 10_000_000
"""Of one list, whatever the operator allows: no list of a body is without a bound that its schema tells."""

_MAX_TOKEN_ID = 2**31 - 1
_EXPECTED = "send a text, a list of token ids, or a list of texts and lists of token ids"


NULL: JsonDict = {"type": "null"}
"""The schema of what a body does not have. Some values of some fields are accepted beside (`protocols.unknown`)."""


class Body(BaseModel):
    """Strict about the types of the fields it has; what it does not have is refused by name (`protocols.unknown`)."""

    model_config = ConfigDict(
        strict=True, extra="allow", protected_namespaces=(), json_schema_extra={"additionalProperties": NULL}
    )

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Values that change nothing here, of fields for which `unknown.NEUTRAL` says something else or nothing."""


def check_known(body: BaseModel, part: str = "") -> None:
    """Raises InvalidInputError for the first field of `body`, or of a body in it, that it does not have.

    `part` is the place of `body` in the request, empty for all of it.
    """
    if not isinstance(body, Body):
        return
    if body.__pydantic_extra__:
        refuse(body.__pydantic_extra__, type(body).model_fields, part, body.neutral)
    for name in _bodies_in(type(body)):
        value, place = getattr(body, name), f"{part}.{name}" if part else name
        if isinstance(value, list):
            for index, each in enumerate(value):
                check_known(each, f"{place}[{index}]")
        elif value is not None:
            check_known(value, place)


@functools.cache
def _bodies_in(cls: type[Body]) -> tuple[str, ...]:
    """Fields that are bodies or lists of them."""
    return tuple(name for name, field in cls.model_fields.items() if _has_body(field.annotation))


def _has_body(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, Body):
        return True
    return any(map(_has_body, get_args(annotation)))


class PartOfBody(BaseModel):
    """Some fields of a body, which is read again in full."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class InferenceBody(Body, ABC):
    """A body that asks one model for something."""

    model: str | None = Field(
        None,
        description="Name of the model, or one of its aliases. May be left out where the path names it, where only one "
        "is served, and where only one answers the task. In the first two cases any name that is not another served "
        "model's will do, unless the server is configured otherwise (`any_model_name`).",
    )

    @property
    def streams(self) -> bool:
        """Whether the answer is wanted in pieces."""
        return False

    @abstractmethod
    def to_request(self, request_id: str, model: str) -> Request:
        """This body as a request of one task. Raises RequestError."""


def check_count(values: list[Any], info: ValidationInfo) -> None:
    """Raises BatchTooLargeError before anything is made of more values than one request may have.

    How many that are is said by whoever has the body read (`body.parse_body`).
    """
    most = min(MOST_INPUTS, (info.context or {}).get("max_client_batch_size", MOST_INPUTS))
    if len(values) > most:
        raise BatchTooLargeError(
            f"`{info.field_name}` has {len(values)} items, and {most} are allowed in one request; send several requests"
        )


def read_inputs(value: Any, info: ValidationInfo) -> tuple[TextInput, ...]:
    """A text, token ids, or a list of these, as a tuple of inputs.

    Raises EmptyInputError or MalformedRequestError, in one sentence that names the field and the place.
    """
    name = info.field_name or "inputs"
    if type(value) is str:
        return (text(value, name),)
    if type(value) is not list:
        raise MalformedRequestError(f"`{name}` is {kind(value)}; {_EXPECTED}")
    if not value:
        raise EmptyInputError(f"`{name}` is empty; {_EXPECTED}")
    kinds = set(map(type, value))
    if kinds == {str}:
        check_count(value, info)
        return tuple(value)
    if kinds == {int}:
        return (token_ids(value, name),)
    check_count(value, info)
    return tuple(_one_of_several(item, f"{name}[{index}]") for index, item in enumerate(value))


@dataclass(frozen=True, slots=True)
class SimilarityInputs:
    """One sentence, and those to compare it with."""

    source_sentence: str
    sentences: tuple[str, ...]


def read_similarity(value: Any, info: ValidationInfo) -> SimilarityInputs:
    """`{"source_sentence": …, "sentences": […]}`. Raises EmptyInputError or MalformedRequestError."""
    name = info.field_name or "inputs"
    if type(value) is not dict:
        raise MalformedRequestError(f"`{name}` is {kind(value)}; send an object of source_sentence and sentences")
    for key in ("source_sentence", "sentences"):
        if key not in value:
            raise MalformedRequestError(f"`{name}.{key}` is missing")
    source = text(value["source_sentence"], f"{name}.source_sentence")
    return SimilarityInputs(source, texts(value["sentences"], f"{name}.sentences", info))


def read_inputs_or_similarity(value: Any, info: ValidationInfo) -> tuple[TextInput, ...] | SimilarityInputs:
    """What either of the two reads, told apart by whether it is an object."""
    return read_similarity(value, info) if type(value) is dict else read_inputs(value, info)


def read_texts(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    """A list of texts. Raises EmptyInputError or MalformedRequestError."""
    return texts(value, info.field_name or "texts", info)


def texts(value: Any, where: str, info: ValidationInfo) -> tuple[str, ...]:
    """As `read_texts`, of a part of the field that `info` is about; `where` is its name."""
    return tuple(text(item, f"{where}[{index}]") for index, item in enumerate(some_list(value, where, info)))


def words(value: Any, where: str, info: ValidationInfo) -> tuple[str, ...]:
    """As `texts`, of what must say something (labels, targets). Raises EmptyInputError for one that is empty."""
    found = texts(value, where, info)
    if "" in found:
        raise EmptyInputError(f"`{where}[{found.index('')}]` is an empty text; leave it out")
    return found


def some_list(value: Any, where: str, info: ValidationInfo) -> list[Any]:
    """A list of some things, and no more than one request may have.

    Raises EmptyInputError, MalformedRequestError or BatchTooLargeError.
    """
    if type(value) is not list:
        raise MalformedRequestError(f"`{where}` is {kind(value)}; send a list of texts")
    if not value:
        raise EmptyInputError(f"`{where}` is empty; send at least one text")
    check_count(value, info)
    return value


def _one_of_several(item: Any, where: str) -> TextInput:
    if type(item) is list:
        return token_ids(item, where)
    return text(item, where)


def text(value: Any, where: str) -> str:
    """A text. It may be empty: the model's special tokens are computed, and a model that has none refuses it.

    Raises MalformedRequestError.
    """
    if type(value) is not str:
        raise MalformedRequestError(f"`{where}` is {kind(value)}; send a text")
    return value


def token_ids(values: list[Any], where: str) -> TokenIds:
    if not values:
        raise EmptyInputError(f"`{where}` is an empty list; leave it out")
    if len(values) > MOST_TOKEN_IDS:
        raise BatchTooLargeError(f"`{where}` has {len(values)} token ids, and {MOST_TOKEN_IDS} are allowed")
    if set(map(type, values)) != {int}:
        raise MalformedRequestError(f"`{where}` is a list that is not all token ids, which are whole numbers")
    if min(values) < 0 or max(values) > _MAX_TOKEN_ID:
        raise MalformedRequestError(f"`{where}` has a token id outside 0 to {_MAX_TOKEN_ID}")
    return tuple(values)


_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


def kind(value: object) -> str:
    """A JSON value's kind in words, so that a message never has to repeat the value."""
    return _KINDS.get(type(value), "of the wrong type")


def items_schema(one: dict[str, Any]) -> dict[str, Any]:
    """A list of as many as one request may have; the operator may allow less."""
    return {"type": "array", "items": one, "minItems": 1, "maxItems": MOST_INPUTS}


IDS_SCHEMA = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": _MAX_TOKEN_ID},
    "minItems": 1,
    "maxItems": MOST_TOKEN_IDS,
}
TEXT_SCHEMA = {"type": "string"}
TEXTS_SCHEMA = items_schema(TEXT_SCHEMA)
WORD_SCHEMA = {"type": "string", "minLength": 1}
WORDS_SCHEMA = items_schema(WORD_SCHEMA)

INPUTS_SCHEMA: dict[str, Any] = {
    "description": "A text, the token ids of a text, or a list of texts and lists of token ids.",
    "anyOf": [
        TEXT_SCHEMA,
        IDS_SCHEMA,
        items_schema({"anyOf": [TEXT_SCHEMA, IDS_SCHEMA]}),
    ],
}

SIMILARITY_SCHEMA: dict[str, Any] = {
    "description": "One sentence, and those to compare it with.",
    "type": "object",
    "properties": {
        "source_sentence": TEXT_SCHEMA,
        "sentences": TEXTS_SCHEMA,
    },
    "required": ["source_sentence", "sentences"],
}

Texts = Annotated[tuple[str, ...], PlainValidator(read_texts), WithJsonSchema(TEXTS_SCHEMA)]
Inputs = Annotated[tuple[TextInput, ...], PlainValidator(read_inputs), WithJsonSchema(INPUTS_SCHEMA)]
Similarity = Annotated[SimilarityInputs, PlainValidator(read_similarity), WithJsonSchema(SIMILARITY_SCHEMA)]
InputsOrSimilarity = Annotated[
    tuple[TextInput, ...] | SimilarityInputs,
    PlainValidator(read_inputs_or_similarity),
    WithJsonSchema({"anyOf": [INPUTS_SCHEMA, SIMILARITY_SCHEMA]}),
]


def _lower(value: object) -> object:
    return cast("object", value.lower()) if value in ("Left", "Right") and isinstance(value, str) else value


LongTextsChoice = Annotated[
    LongTexts | None,
    Field(
        description="What becomes of texts that are too long: cut, refused, or read in overlapping windows whose "
        "results are put together. As the model is configured where it is left out, unless `truncate` says it."
    ),
]
Stride = Annotated[
    int | None,
    Field(ge=0, le=_MAX_TOKEN_ID, description="Tokens that neighbouring windows share; as the model is configured."),
]

Direction = Annotated[Side, BeforeValidator(_lower)]
"""TEI takes both "right" and "Right"."""

Normalize = Annotated[
    bool | None,
    Field(description="Scale vectors to length 1 (true) or not (false); null: as the model's own files say."),
]
Truncate = Annotated[
    bool | None,
    Field(
        description="Cut inputs that are too long (true) or refuse them (false); as the model is configured where it "
        "is left out or null."
    ),
]


def long_texts(truncate: bool | None) -> LongTexts | None:
    """The wire's `truncate` in our terms."""
    return None if truncate is None else "truncate" if truncate else "error"


TruncationDirection = Annotated[
    Direction | None, Field(description="The side that is cut off; as the model is configured where it is left out.")
]


class LongTextFields(Body):
    """What becomes of texts that are longer than the model takes."""

    truncate: Truncate = None
    truncation_direction: TruncationDirection = None
    long_texts: LongTextsChoice = None
    stride: Stride = None

    def choice(self) -> LongTexts | None:
        return self.long_texts or long_texts(self.truncate)

    def over(self, nested: LongTextFields) -> LongTextFields:
        """These, which stand beside the inputs; where they say nothing, those of `nested`."""
        return LongTextFields(
            long_texts=self.choice() or nested.choice(),
            stride=nested.stride if self.stride is None else self.stride,
            truncation_direction=self.truncation_direction or nested.truncation_direction,
        )

    def request(self, id: str, model: str, task: str, inputs: tuple[TextInput, ...], options: TaskOptions) -> Request:
        return Request(id, model, task, inputs, options, self.choice(), self.truncation_direction, self.stride)


PromptName = Annotated[
    str | None,
    Field(description="Which of the model's prompts to put before each text; the model's default where left out."),
]
Dimensions = Annotated[
    int | None,
    Field(
        description="Keep only the first so many numbers of each vector, then normalize: 1 to the model's hidden size.",
        json_schema_extra={"minimum": 1},
    ),
]


def _template(value: object) -> object:
    return DEFAULT_TEMPLATE if value is None else value


HypothesisTemplate = Annotated[
    str,
    BeforeValidator(_template),
    Field(max_length=10_000, description="The sentence that a label is put into, at its one `{}`."),
]
EncodingFormat = Literal["float", "base64"]


def documented(**example: Any) -> ConfigDict:
    """A configuration for a body that gives the documentation this example."""
    return ConfigDict(json_schema_extra={"examples": [example], "additionalProperties": NULL})
