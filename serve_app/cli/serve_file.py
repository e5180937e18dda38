"""A Serve config file, read and held against Ray's own schema: stricter than Ray, which ignores unknown keys."""

from __future__ import annotations

import copy
import difflib
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from serve_app.config import SURGE_PERCENT


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong (or, if not `is_error`, doubtful) at a key of the file."""

    key: str
    reason: str
    is_error: bool = True

    def __str__(self) -> str:
        return f"{self.key}: {'' if self.is_error else 'warning: '}{self.reason}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One item of `deployments:`."""

    name: str
    where: str
    options: Mapping[str, Any]

    @property
    def user_config(self) -> Any:
        return self.options.get("user_config")

    @property
    def replicas(self) -> tuple[int, int]:
        """Fewest and most replicas that this entry allows."""
        count = self.options.get("num_replicas")
        if isinstance(count, int):
            return count, count
        bounds = self.options.get("autoscaling_config") or {}
        fewest = int(bounds.get("min_replicas", 1))
        return fewest, int(bounds.get("max_replicas", max(fewest, 1)))

    @property
    def surge(self) -> int:
        """How many new replicas may run beside the fewest old ones while they are replaced."""
        percent = int(self.options.get("max_surge_percent", SURGE_PERCENT))
        return math.ceil(percent * self.replicas[0] / 100)


@dataclass(frozen=True, slots=True)
class Application:
    """One item of `applications:`."""

    name: str
    where: str
    route_prefix: str | None
    import_path: str
    args: Any
    deployments: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class ServeFile:
    applications: tuple[Application, ...]
    host: str
    """Where HTTP listens; Serve's default is every address."""
    http_port: int
    grpc_port: int | None
    """None where there is no gRPC."""
    controller_variables: Mapping[str, str]
    """Environment variables of Serve's controller, which starts HAProxy."""


def parse_file(path: Path) -> tuple[ServeFile | None, list[Finding]]:
    """The file if it is well formed as far as Ray is concerned, and what is wrong with it."""
    try:
        raw = yaml.load(path.read_text("utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        return None, [Finding("file", error.strerror or str(error))]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return None, [Finding("yaml", " ".join(str(error).split()))]
    if not isinstance(raw, dict):
        return None, [Finding("yaml", "the file must be a mapping with the key applications")]
    findings = schema_findings(raw)
    if any(finding.is_error for finding in findings):
        return None, findings
    http, grpc = raw.get("http_options") or {}, raw.get("grpc_options") or {}
    runtime_env = (raw.get("controller_options") or {}).get("runtime_env") or {}
    file = ServeFile(
        applications=tuple(_applications(raw)),
        host=str(http.get("host", "0.0.0.0")),
        http_port=int(http.get("port", 8000)),
        grpc_port=int(grpc.get("port", 9000)) if grpc.get("grpc_servicer_functions") else None,
        controller_variables=runtime_env.get("env_vars") or {},
    )
    return file, findings


def schema_findings(raw: dict[str, Any]) -> list[Finding]:
    """What Ray's schema refuses, and the keys that it would ignore."""
    from ray.serve.schema import ServeDeploySchema

    findings = list(_unknown_keys(raw, ServeDeploySchema, ""))
    try:
        ServeDeploySchema.model_validate(copy.deepcopy(raw))
    except ValidationError as error:
        findings += [Finding(_dotted(problem["loc"]), problem["msg"]) for problem in error.errors()]
    return list({finding.key: finding for finding in reversed(findings)}.values())[::-1] or _autoscaling(raw)


def _autoscaling(raw: dict[str, Any]) -> list[Finding]:
    """The deployment schema takes any mapping for `autoscaling_config`, and fails later."""
    return [
        finding
        for application in _applications(raw)
        for entry in application.deployments
        for finding in _autoscaling_of(entry)
    ]


def _autoscaling_of(entry: Entry) -> list[Finding]:
    from ray.serve.config import AutoscalingConfig

    where = f"{entry.where}.autoscaling_config"
    try:
        AutoscalingConfig.model_validate(entry.options.get("autoscaling_config") or {})
    except ValidationError as error:
        return [Finding(f"{where}.{_dotted(e['loc'])}".rstrip("."), e["msg"]) for e in error.errors()]
    return []


def _applications(raw: dict[str, Any]) -> Iterator[Application]:
    for i, application in enumerate(raw["applications"]):
        where = f"applications[{i}]"
        entries = tuple(
            Entry(options["name"], f"{where}.deployments[{j}]", options)
            for j, options in enumerate(application.get("deployments") or [])
        )
        name, route_prefix = application.get("name", "default"), application.get("route_prefix", "/")
        yield Application(name, where, route_prefix, application["import_path"], application.get("args"), entries)


def _unknown_keys(value: Any, model: type[BaseModel], where: str) -> Iterator[Finding]:
    """Keys of a mapping, and of the mappings in it, that the model does not have."""
    if not isinstance(value, dict):
        return
    known = {field.alias or name: field for name, field in model.model_fields.items()}
    for key, inner in value.items():
        at = f"{where}.{key}" if where else str(key)
        if key not in known:
            yield Finding(at, _unknown(str(key), list(known)))
            continue
        for nested in _models_in(known[key].annotation):
            if isinstance(inner, list):
                for i, item in enumerate(inner):
                    yield from _unknown_keys(item, nested, f"{at}[{i}]")
            else:
                yield from _unknown_keys(inner, nested, at)


def _unknown(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return "unknown key, which Serve would ignore" + (f"; did you mean {close[0]}?" if close else "")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a type is made of, as in Optional[List[Model]]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)


def _dotted(loc: tuple[int | str, ...]) -> str:
    key = ""
    for part in loc:
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
    return key.removeprefix(".")


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, where YAML's last one would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
