"""`serve-app prewarm`: bring models to the nodes of a cluster before a deploy, or to the machine it runs on."""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from serve_app.cache.manifest import Manifest
from serve_app.cache.node import NodeCache, warm_this_node
from serve_app.cache.status import ModelOnNode, Progress
from serve_app.cli.serve_file import parse_file
from serve_app.config import MODEL_BUILDER, CacheConfig, ModelAppConfig, ModelConfig, parse
from serve_app.errors import CacheError, ConfigError
from serve_app.ingress.reach import is_loopback

LOOK_S = 0.5
KNOCK_S = 10.0
HERE = "this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", default=Path("serve_config.yaml"), help="what is to be served")
    parser.add_argument("--address", default="auto", help="the Ray cluster (default: the one this machine belongs to)")
    parser.add_argument("--node", action="store_true", help="warm the machine this runs on only; needs no cluster")
    parser.add_argument("--model", action="append", metavar="NAME", help="only this model (may be given several times)")
    parser.add_argument("--verify", action="store_true", help="read every byte of what is there already")
    parser.add_argument("--json", action="store_true", help="print where each model is, as JSON, at the end")


def run(args: argparse.Namespace) -> int:
    plans = [plan.reduced(args.model, verify=args.verify) for plan in read_plans(args.config)]
    if not any(plan.models for plan in plans):
        raise ConfigError(f"{args.config}: there is no model {', '.join(args.model or ['to warm'])}")
    with Board(sys.stderr.isatty()) as board:
        states = warm_machine(plans, board) if args.node else warm_cluster(plans, args.address, board)
    return report(states, as_json=args.json)


@dataclass(frozen=True, slots=True)
class Plan:
    """The models that share a cache."""

    models: tuple[ModelConfig, ...]
    cache: CacheConfig

    def reduced(self, names: Sequence[str] | None, *, verify: bool) -> Plan:
        """Only the models of those names, if any are given; `verify` reads copies in full."""
        models = tuple(model for model in self.models if names is None or model.name in names)
        cache = self.cache.model_copy(update={"verify": "sha256"}) if verify else self.cache
        return Plan(models, cache)


def read_plans(path: Path) -> list[Plan]:
    """What a Serve config file serves, a plan for each cache. Raises ConfigError that names every wrong key."""
    file, findings = parse_file(path)
    if file is None:
        raise ConfigError("\n".join(f"{path}: {finding}" for finding in findings))
    ours = [application for application in file.applications if application.import_path == MODEL_BUILDER]
    configs = [parse(ModelAppConfig, application.args, f"{path}: {application.where}.args") for application in ours]
    models: dict[str, list[ModelConfig]] = {}
    for config in configs:
        models.setdefault(config.cache.model_dump_json(), []).append(config.model)
    return [Plan(tuple(of_one), CacheConfig.model_validate_json(cache)) for cache, of_one in models.items()]


def warm_machine(plans: Sequence[Plan], board: Board) -> list[ModelOnNode]:
    """Each model on this machine; an error of one does not keep the others from being warmed."""
    return [state for plan in plans for state in _warm_here(plan, board)]


def _warm_here(plan: Plan, board: Board) -> list[ModelOnNode]:
    node = NodeCache(plan.cache)
    with board.watching(lambda: [_on_this_machine(*arrival) for arrival in node.arriving()]):
        return [_warm_one(model, plan.cache, node) for model in plan.models]


def _warm_one(model: ModelConfig, cache: CacheConfig, node: NodeCache) -> ModelOnNode:
    try:
        path = warm_this_node(model, cache, node)
    except CacheError as error:
        return ModelOnNode("", HERE, model.name, model.revision or "", "error", error=error.message)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return ModelOnNode("", HERE, model.name, path.name, "ready", size, size)


def _on_this_machine(manifest: Manifest, progress: Progress) -> ModelOnNode:
    total = manifest.total_bytes
    return ModelOnNode("", HERE, manifest.name, manifest.revision, "pending", bytes_total=total).at(progress)


def warm_cluster(plans: Sequence[Plan], address: str, board: Board) -> list[ModelOnNode]:
    """Each model on every node that is alive. Raises ConfigError if there is no cluster at `address`."""
    import ray
    from ray._private import ray_constants
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    try:
        _knock(address)
        ray_constants.ENABLE_RAY_CLUSTER = not _is_for_this_machine(address)
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # Ray does so for the address `auto` only
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except OSError as error:
        raise ConfigError(
            f"there is no Ray cluster at {address!r} ({error}). Start one, give its --address, or warm this machine "
            "alone with --node"
        ) from error
    try:
        return asyncio.run(_warm_all(plans, board))
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError if nothing listens at `<host>:<port>`, for which Ray itself would wait for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()


def _is_for_this_machine(address: str) -> bool:
    """Whether the cluster is one that listens on loopback alone, as `serve-app serve` starts it.

    Ray looks for a cluster at 127.0.0.1 at this machine's own address, unless it knows that.
    """
    from ray._private.services import get_node_ip_address, get_ray_address_from_environment

    found = get_ray_address_from_environment(address, None) if address == "auto" else address
    host, _, port = (found or "").rpartition(":")
    if not is_loopback(host):
        return False
    try:
        _knock(f"{get_node_ip_address()}:{port}")
    except OSError:
        return True
    return False


async def _warm_all(plans: Sequence[Plan], board: Board) -> list[ModelOnNode]:
    return [state for plan in plans for state in await _warm_plan(plan, board)]


async def _warm_plan(plan: Plan, board: Board) -> list[ModelOnNode]:
    from serve_app.cache.warmer import ask_warmer

    warming = asyncio.create_task(ask_warmer("prewarm", plan.cache, "warm", plan.models, True))
    while not warming.done():
        await asyncio.wait({warming}, timeout=LOOK_S)
        board.show(await ask_warmer("prewarm", plan.cache, "status"))
    states: list[ModelOnNode] = await ask_warmer("prewarm", plan.cache, "status")
    with suppress(CacheError):  # it is among the states, with its node
        await warming
    if warming.exception() is not None and not any(state.error for state in states):
        await warming
    return states


class Board:
    """Progress on stderr: a bar for each model on each node; without a terminal, a line whenever a phase changes."""

    def __init__(self, has_bars: bool) -> None:
        self._has_bars = has_bars
        self._bars: dict[tuple[str, str], tqdm[NoReturn]] = {}
        self._phases: dict[tuple[str, str], str] = {}

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def show(self, states: Sequence[ModelOnNode]) -> None:
        for state in states:
            if self._has_bars:
                self._draw(state)
            elif self._phases.get((state.model, state.address)) != state.phase:
                self._phases[state.model, state.address] = state.phase
                print(f"{state.model} on {state.address}: {state.phase}", file=sys.stderr)

    def _draw(self, state: ModelOnNode) -> None:
        key = (state.model, state.address)
        if key not in self._bars:
            description = f"{state.model} on {state.address}"
            self._bars[key] = tqdm(
                desc=description, unit="B", unit_scale=True, file=sys.stderr, position=len(self._bars)
            )
        bar = self._bars[key]
        bar.total = state.bytes_total or None
        bar.n = state.bytes_done
        bar.set_postfix_str(state.phase)

    @contextmanager
    def watching(self, look: Callable[[], Sequence[ModelOnNode]]) -> Iterator[None]:
        """Show what `look` returns, over and over, while the `with` block runs."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(LOOK_S):
                self.show(look())

        thread = threading.Thread(target=watch, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def report(states: Sequence[ModelOnNode], *, as_json: bool) -> int:
    """Print where each model is; 1 if one is not where it should be, else 0."""
    if as_json:
        print(json.dumps([asdict(state) for state in states], indent=1))
    else:
        for state in states:
            size = f"{state.bytes_total / 1e6:,.1f} MB" if state.bytes_total else ""
            print(
                f"{state.model} {state.revision} on {state.address}: {state.error or f'{state.phase} {size}'.rstrip()}"
            )
    return 1 if any(state.phase != "ready" for state in states) else 0
