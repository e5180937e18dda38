"""One URL for every task of a model: the task it is served for says how a body is read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeAlias

from serve_app.config import IngressSettings
from serve_app.errors import InvalidInputError
from serve_app.ingress.body import parse_body, read_body
from serve_app.ingress.exchange import Exchange, Reply, while_connected
from serve_app.ingress.inference import answer, choose_model, stream
from serve_app.ingress.protocols.fields import PartOfBody
from serve_app.ingress.protocols.huggingface.body import TaskBody
from serve_app.ingress.protocols.huggingface.classification import (
    ClassificationBody,
    LabelScoreBody,
    PipelineLabelsBody,
    zero_shot_writer,
)
from serve_app.ingress.protocols.huggingface.dialect import DIALECT
from serve_app.ingress.protocols.huggingface.dialect import GENERATING as GENERATING_DIALECT
from serve_app.ingress.protocols.huggingface.features import FeatureBody, SparseBody
from serve_app.ingress.protocols.huggingface.generation import (
    GeneratingBody,
    Seq2SeqBody,
    SummarizationBody,
    SummarizationOutput,
    Text2TextOutput,
    TextGenerationBody,
    TextGenerationOutput,
    TranslationBody,
    TranslationOutput,
)
from serve_app.ingress.protocols.huggingface.ranking import QueryBody, RankingBody
from serve_app.ingress.protocols.huggingface.spans import (
    EntityBody,
    FillBody,
    FillMaskBody,
    QuestionAnsweringBody,
    SpanBody,
    TokenClassificationBody,
)
from serve_app.ingress.protocols.ranks import Rank, RerankList
from serve_app.ingress.protocols.sparse import SparseEntry
from serve_app.ingress.routes import COMPUTE_FAILURES, Route
from serve_app.ingress.streaming import Events
from serve_app.outputs import GeneratedPiece
from serve_app.tasks.generation import GENERATING
from serve_app.types import Answer, Request

BODIES: Mapping[str, type[TaskBody]] = {
    "embedding": FeatureBody,
    "sparse-embedding": SparseBody,
    "text-classification": ClassificationBody,
    "rerank": ClassificationBody,
    "zero-shot-classification": ClassificationBody,
    "token-classification": TokenClassificationBody,
    "fill-mask": FillMaskBody,
    "question-answering": QuestionAnsweringBody,
    "text-generation": TextGenerationBody,
    "text2text-generation": Seq2SeqBody,
    "summarization": SummarizationBody,
    "translation": TranslationBody,
}
"""How the bodies for a model are read, by the task that it is served for."""

AnyBody: TypeAlias = (
    FeatureBody
    | SparseBody
    | ClassificationBody
    | RankingBody
    | TokenClassificationBody
    | FillMaskBody
    | QuestionAnsweringBody
    | TextGenerationBody
    | Seq2SeqBody
    | SummarizationBody
    | TranslationBody
)
AnyAnswer: TypeAlias = (
    list[list[float]]
    | list[float]
    | list[list[SparseEntry]]
    | list[list[LabelScoreBody]]
    | list[LabelScoreBody]
    | PipelineLabelsBody
    | list[PipelineLabelsBody]
    | list[Rank]
    | RerankList
    | list[list[EntityBody]]
    | list[EntityBody]
    | list[list[list[FillBody]]]
    | list[list[FillBody]]
    | list[FillBody]
    | list[list[SpanBody]]
    | list[SpanBody]
    | SpanBody
    | list[TextGenerationOutput]
    | list[Text2TextOutput]
    | list[SummarizationOutput]
    | list[TranslationOutput]
)


class NamedBody(PartOfBody):
    """What any body may say about the model."""

    model: str | None = None


async def ask(exchange: Exchange) -> Reply:
    """Answer whatever the model's task is. Raises ServeAppError or ClientDisconnectedError."""
    raw = await read_body(exchange)
    models = exchange.service.models
    named = exchange.path_model is not None or len(models) == 1
    model = choose_model(exchange, None if named else parse_body(NamedBody, raw, exchange.settings).model)
    card = await while_connected(exchange.receive, exchange.service.card(model), exchange.time_left_s)
    kind = _kind(card.task, raw, exchange.settings)
    exchange.dialect = dialect = GENERATING_DIALECT if card.task in GENERATING else DIALECT
    body = parse_body(kind, raw, exchange.settings)
    request = body.to_request(exchange.id, choose_model(exchange, body.model))
    if body.streams:
        return await stream(exchange, body, request, _write_stream, dialect)
    if isinstance(body, ClassificationBody) and request.task == "zero-shot-classification":
        return await answer(exchange, body, request, zero_shot_writer(exchange.headers))
    return await answer(exchange, body, request, _write)


def _kind(task: str, raw: bytes, settings: IngressSettings) -> type[TaskBody]:
    """How the body is read. Raises InvalidInputError or MalformedRequestError."""
    kind = BODIES.get(task)
    if kind is None:
        raise InvalidInputError(f"models of task {task} are not asked here; /docs lists other paths")
    if task == "rerank" and parse_body(QueryBody, raw, settings).query is not None:
        return RankingBody
    return kind


def _write(body: TaskBody, request: Request, computed: Answer) -> bytes:
    return body.write(request, computed)


def _write_stream(body: TaskBody, request: Request, pieces: AsyncIterator[GeneratedPiece]) -> Events:
    assert isinstance(body, GeneratingBody)
    return body.write_stream(request, pieces)


def routes() -> tuple[Route, ...]:
    answered: Any = AnyAnswer
    return tuple(
        Route(
            "POST",
            path,
            ask,
            DIALECT,
            "Any task of the model",
            answer=answered,
            body=AnyBody,
            failures=COMPUTE_FAILURES,
            streams=True,
            description="The task that the model is served for decides which of the bodies is read.",
        )
        for path in ("/", "/models/{name}")
    )
