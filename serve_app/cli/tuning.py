"""Settings that are right each by itself and wrong together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from serve_app.cache.resolve import files_in, source_folder
from serve_app.cli.ports import CONTROLLER
from serve_app.cli.serve_file import Entry, Finding, ServeFile
from serve_app.config import (
    GRACEFUL_SHUTDOWN_S,
    INGRESS_SLOTS,
    MOST_QUESTIONS,
    IngressSettings,
    ModelConfig,
    ModelSettings,
    model_deployment,
    source_kind,
    tokenizer_deployment,
)
from serve_app.errors import ServeAppError, SourceNotFoundError
from serve_app.tasks.card import read_card

DRAINING_S, HARD_STOP_S, CLIENT_S = 30.0, 120.0, 3600.0
"""Serve's defaults, in seconds: for how long a stopping ingress replica still takes requests, for how long a HAProxy
that was replaced goes on with what it has, and how long a client of HAProxy may be silent."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model of the file, and the key that it stands at."""

    config: ModelConfig
    where: str


@dataclass(slots=True)
class Deployed:
    """The deployments as the file tunes them; what it does not name keeps its defaults."""

    ingress: IngressSettings = field(default_factory=IngressSettings)
    models: list[ModelEntry] = field(default_factory=list)
    settings: dict[str, ModelSettings] = field(default_factory=dict)
    """By the model's name."""
    entries: dict[str, Entry] = field(default_factory=dict)
    """By the deployment's name."""


def tuning_findings(deployed: Deployed, cores: int) -> list[Finding]:
    findings = [*_ingress(deployed)]
    for served in deployed.models:
        findings += _model(served.config, deployed, served.where, cores)
    return [*findings, *_cpus(deployed, cores)]


def timing_findings(deployed: Deployed, file: ServeFile) -> Iterator[Finding]:
    """Times that would cut a request, or a stream in the midst of its answer, before its own time is over."""
    variables = file.controller_variables
    request_s = deployed.ingress.request_timeout_s
    draining_s = float(variables.get("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", DRAINING_S))
    for entry in deployed.entries.values():
        grace_s = entry.options.get("graceful_shutdown_timeout_s", GRACEFUL_SHUTDOWN_S)
        needed_s, sum_of = request_s, f"request_timeout_s ({request_s:g})"
        if entry.name == "ingress":
            needed_s += draining_s
            sum_of += f" + RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S ({draining_s:g})"
        if grace_s < needed_s:
            yield Finding(
                f"{entry.where}.graceful_shutdown_timeout_s",
                f"{grace_s:g} is below {sum_of}: a stopping replica would be killed before its requests have had their "
                f"time; raise it to {needed_s:g} at least",
            )
    if variables.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        yield from _haproxy(deployed.ingress, file)


def _haproxy(settings: IngressSettings, file: ServeFile) -> Iterator[Finding]:
    variables, request_s = file.controller_variables, settings.request_timeout_s
    needed = [
        (
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S",
            HARD_STOP_S,
            request_s + settings.write_timeout_s,
            "request_timeout_s + write_timeout_s: a deploy would cut answers that still have time",
        ),
        ("RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S", math.inf, request_s, "request_timeout_s: HAProxy would give up before"),
    ]
    if file.grpc_port is not None:
        silent_s = max(request_s, settings.stream_idle_timeout_s)
        why = "request_timeout_s or stream_idle_timeout_s: HAProxy would cut gRPC streams whose client only waits"
        needed.append(("RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S", CLIENT_S, silent_s, why))
    for name, usual_s, least_s, why in needed:
        given_s = float(variables.get(name) or usual_s)
        if given_s < least_s:
            yield Finding(
                f"{CONTROLLER}.{name}",
                f"{given_s:g} is below {least_s:g} = {why}; raise it, or lower those",
            )


def _ingress(deployed: Deployed) -> Iterator[Finding]:
    settings, entry = deployed.ingress, deployed.entries.get("ingress")
    if entry is None:
        return
    slots = entry.options.get("max_ongoing_requests", INGRESS_SLOTS)
    batches = settings.max_batch_requests * settings.max_concurrent_batches
    if slots < batches:
        yield Finding(
            f"{entry.where}.max_ongoing_requests",
            f"{slots} is below max_batch_requests x max_concurrent_batches = {settings.max_batch_requests} x "
            f"{settings.max_concurrent_batches} = {batches}: batches would never fill; raise it, or lower those",
        )
    if slots < settings.needed_slots:
        yield Finding(
            f"{entry.where}.max_ongoing_requests",
            f"{slots} is below 2 x max_concurrent_requests + {MOST_QUESTIONS} = {settings.needed_slots}: that many "
            "requests, gRPC streams and questions of operators one replica may have; further ones would wait where no "
            "deadline counts. Raise it, or lower max_concurrent_requests",
        )
    yield from _queue(entry, settings)


def _queue(entry: Entry, settings: IngressSettings) -> Iterator[Finding]:
    """What is wrong with the requests that may wait for a slot."""
    where, queued = f"{entry.where}.max_queued_requests", entry.options.get("max_queued_requests", INGRESS_SLOTS)
    if queued == -1:
        reason = "-1 lets any number of requests wait in an ingress replica, where no deadline counts; set a bound"
        yield Finding(where, f"{reason}, such as {INGRESS_SLOTS}", is_error=False)
    elif queued < settings.max_concurrent_requests:
        yield Finding(
            where,
            f"{queued} is below max_concurrent_requests ({settings.max_concurrent_requests}): Serve counts each "
            "request as waiting for a moment, and would refuse some that come together though slots are free; raise it",
        )


def _model(model: ModelConfig, deployed: Deployed, where: str, cores: int) -> Iterator[Finding]:
    settings = deployed.settings.get(model.name, ModelSettings())
    entry = deployed.entries.get(model_deployment(model.name))
    at = f"{entry.where}.user_config" if entry is not None else where
    longest, problem = _longest_input(model, where)
    if problem is not None:
        yield problem
    tokens = settings.max_batch_tokens
    if longest is not None and tokens is not None and tokens < longest:
        yield Finding(
            f"{at}.max_batch_tokens",
            f"{tokens} is below the model's longest input, {longest} tokens; "
            f"raise it, or lower max_input_tokens of {model.name}",
        )
    if tokens is not None and settings.max_queued_tokens < tokens:
        yield Finding(
            f"{at}.max_queued_tokens",
            f"{settings.max_queued_tokens} is below max_batch_tokens ({tokens}): no batch could ever be full",
        )
    request_s = deployed.ingress.request_timeout_s
    if settings.max_forward_s >= request_s:
        yield Finding(
            f"{at}.max_forward_s",
            f"{settings.max_forward_s:g} is not below request_timeout_s ({request_s:g}): a forward pass that hangs "
            "would be noticed when its requests have no time left for another replica; lower it",
            is_error=False,
        )
    if entry is not None:
        yield from _threads(model, entry, cores)


def _longest_input(model: ModelConfig, where: str) -> tuple[int | None, Finding | None]:
    """Tokens of the longest input, where the model's files lie here; or why that cannot be known."""
    if source_kind(model.source) == "hub":
        return model.max_input_tokens, None
    try:
        folder = source_folder(model.source)
        files_in(folder, model)
        return read_card(folder, model, "").max_input_tokens, None
    except SourceNotFoundError as error:
        return model.max_input_tokens, Finding(f"{where}.source", f"not on this machine: {error}", is_error=False)
    except ServeAppError as error:
        return None, Finding(where, error.message)


def _threads(model: ModelConfig, entry: Entry, cores: int) -> Iterator[Finding]:
    if model.device == "cuda" or _resources(entry).get("num_gpus"):
        return
    most = entry.replicas[1]
    if model.num_threads * most > cores:
        yield Finding(
            entry.where,
            f"num_threads x replicas = {model.num_threads} x {most} is above this machine's {cores} cores; "
            "where they all run on one machine, they slow each other down to less than half",
            is_error=False,
        )


def _cpus(deployed: Deployed, cores: int) -> Iterator[Finding]:
    needed = sum(entry.replicas[0] * _resources(entry).get("num_cpus", 0) for entry in deployed.entries.values())
    if needed > cores:
        yield Finding(
            "deployments",
            f"the fewest replicas need {needed:g} CPUs and this machine has {cores}: alone, it would wait for ever",
            is_error=False,
        )
        return
    for surging in _surging(deployed):
        room = needed + sum(entry.surge * _resources(entry).get("num_cpus", 0) for entry in surging)
        if room > cores:
            names = " and ".join(entry.name for entry in surging)
            yield Finding(
                "deployments",
                f"the fewest replicas need {needed:g} CPUs, {room:g} while {names} are replaced, and this machine has "
                f"{cores}: alone, it would wait with the roll-out for ever. Lower num_cpus, or set max_surge_percent "
                "to 0, with which the old replicas stop first and requests wait",
                is_error=False,
            )


def _surging(deployed: Deployed) -> Iterator[list[Entry]]:
    """The deployments that are replaced together: those of each application."""
    together = [["ingress"]]
    together += [[tokenizer_deployment(m.config.name), model_deployment(m.config.name)] for m in deployed.models]
    for names in together:
        yield [deployed.entries[name] for name in names if name in deployed.entries]


def _resources(entry: Entry) -> Mapping[str, Any]:
    return entry.options.get("ray_actor_options") or {}
