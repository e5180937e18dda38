"""The `<model>-tokenizer` deployment: keeps tokenizing off the ingress's event loop and off the GPU's host."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from serve_app.cache.prewarm import Membership, ensure_local, replica_environment, version_here
from serve_app.config import CacheConfig, ModelConfig
from serve_app.errors import ConfigError, UnavailableError
from serve_app.logs import show_log
from serve_app.metrics import ReplicaMetrics
from serve_app.tasks import probe
from serve_app.tasks.card import read_card
from serve_app.tasks.stock_tokenizer import StockTokenizer, read_stock_tokenizer
from serve_app.tokenizer.encoder import Encoder
from serve_app.tokenizer.slow import SlowEncoder
from serve_app.types import Forget, ModelCard, TokenBatch, TokenizeCall, TokenizeRequest, VersionCall

_OF_PAIRS = ("rerank", "question-answering", "zero-shot-classification")

STUCK_AFTER_S = 300.0
"""Seconds for which a thread may tokenize one call: far more than the largest one takes on a busy machine."""


class TokenizerReplica:
    """Tokenizes in threads of its own (Rust releases the GIL there), so that its event loop always answers."""

    async def __init__(self, model: ModelConfig, cache: CacheConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        show_log(logging.INFO)  # the task that a model is found to be for is said here, once a replica
        os.environ.update(replica_environment(cache))
        # Read once by Rust's thread pool: one call is one thread, and calls run side by side.
        os.environ["RAYON_NUM_THREADS"] = "1"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        path = await ensure_local(model, cache)
        self._version = await version_here(path, model, cache)
        card = await asyncio.to_thread(read_card, path, model, self._version.revision)
        converses = card.can_chat and card.task == "text-generation"  # whose template is rendered by transformers
        stock = await asyncio.to_thread(read_stock_tokenizer, path, here=converses)
        self._card = stock.completed(card)
        self._encoder = await asyncio.to_thread(encoder_of, path, card.max_input_tokens, stock.answering(card.task))
        check_pairs(card, self._encoder)
        if converses:
            await asyncio.to_thread(self._encoder.load_chat_template)
        self._metrics = ReplicaMetrics()
        self._begun: dict[int, float] = {}
        self._threads = ThreadPoolExecutor(model.tokenizer_threads, thread_name_prefix="tokenizer")
        self._membership = Membership(cache, model, "tokenizer", self._version)
        await self._membership.enter(await self._prove())

    async def _prove(self) -> TokenBatch:
        """Encode a text, for the model replicas of this version to compute. Raises the error that it ends in."""
        batch = await self._encode((probe.TEXT,))
        if batch.failures:
            raise batch.failures[0]
        return batch

    async def _encode(self, requests: tuple[TokenizeRequest, ...]) -> TokenBatch:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._encode_here, requests)

    def _encode_here(self, requests: tuple[TokenizeRequest, ...]) -> TokenBatch:
        """On a thread of the pool, which is known to be busy since when."""
        thread = threading.get_ident()
        self._begun[thread] = time.monotonic()
        try:
            return self._encoder.encode(requests)
        finally:
            del self._begun[thread]

    def _check(self) -> None:
        """Raises UnavailableError if a thread does not come back from a call: the event loop would never show that."""
        longest_s = time.monotonic() - min(self._begun.copy().values(), default=math.inf)
        if longest_s > STUCK_AFTER_S:
            raise UnavailableError(f"a thread of this replica has tokenized one call for {longest_s:.0f} s")

    def record_replica_metadata(self) -> dict[str, str]:
        """What Serve tells every router of this replica."""
        return asdict(self._version)

    async def tokenize(self, call: TokenizeCall) -> TokenBatch:
        """Encode the requests of one coalesced batch; failures are per request, in the answer.

        Raises VersionGoneError, as the other methods do, if the call is for another version.
        """
        self._version.check(call.version)
        return await self._encode(call.requests)

    async def forget(self, forget: Forget) -> bool:
        """Nothing is forgotten: within one call no text can be skipped. The answer shows that the replica lives.

        Raises UnavailableError if it must be replaced.
        """
        self._check()
        return False

    async def definition(self, call: VersionCall) -> str:
        """The tokenizer as the JSON of a `tokenizer.json`; an ingress asks once, for tasks that answer with words.

        Empty where the tokenizer has no fast form.
        """
        self._version.check(call.version)
        return self._encoder.definition

    async def check_health(self) -> None:
        """Raises if this replica must be replaced."""
        self._metrics.look()
        self._check()

    async def card(self, call: VersionCall) -> ModelCard:
        """What the model's files say; the ingress asks once."""
        self._version.check(call.version)
        return self._card


def encoder_of(path: Path, max_input_tokens: int, stock: StockTokenizer | None = None) -> Encoder | SlowEncoder:
    """What encodes for the model in `path`; `stock` is what was read of its tokenizer already.

    Raises IncompleteModelError if no tokenizer can be made, ConfigError if the limit leaves no room for a text.
    """
    stock = stock or read_stock_tokenizer(path)
    return SlowEncoder(path, max_input_tokens) if stock.definition is None else Encoder(path, max_input_tokens, stock)


def check_pairs(card: ModelCard, encoder: Encoder | SlowEncoder) -> None:
    """Raises ConfigError if the task is about pairs, and the model cannot be given any."""
    if card.task in _OF_PAIRS and isinstance(encoder, Encoder) and encoder.token_types.refusal is not None:
        raise ConfigError(f"models.{card.name}.task: {card.task} is about pairs: {encoder.token_types.refusal}")
