"""`serve-app check`: everything that can be known wrong about a configuration before a cluster starts.

Serve ignores keys that it does not know, so a misspelled one silently keeps its default; and what the application
itself refuses shows up only in a replica's log. Here each is one line: file, key, reason.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from serve_app.cli.exposure import exposure_findings
from serve_app.cli.serve_file import Application, Finding, ServeFile, parse_file
from serve_app.cli.tuning import Deployed, timing_findings, tuning_findings
from serve_app.config import AppConfig, IngressSettings, ModelConfig, ModelSettings, parse
from serve_app.errors import ConfigError

BUILDER = "serve_app.app:build"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", default=Path("serve_config.yaml"), help="the file to check")


def run(args: argparse.Namespace) -> int:
    errors = show(args.config, check_file(args.config))
    if errors:
        print(f"{args.config}: {errors} error{'s' if errors > 1 else ''}", file=sys.stderr)
        return 1
    print(f"{args.config}: no errors")
    return 0


def show(path: Path, findings: Sequence[Finding]) -> int:
    """Print findings of a file to standard error; how many of them are errors."""
    for finding in findings:
        print(f"{path}: {finding}", file=sys.stderr)
    return sum(finding.is_error for finding in findings)


def check_file(path: Path, cores: int | None = None) -> list[Finding]:
    """All that is wrong, errors and warnings, in the file's order. `cores` are this machine's unless given."""
    file, findings = parse_file(path)
    if file is None:
        return findings
    for application in file.applications:
        if application.import_path == BUILDER:
            findings += _check_application(application, file, cores or os.cpu_count() or 1)
    return findings


def _check_application(application: Application, file: ServeFile, cores: int) -> list[Finding]:
    where = f"{application.where}.args"
    try:
        config = parse(AppConfig, application.args, where)
    except ConfigError as error:
        return [_from_line(line) for line in error.message.splitlines()]
    deployed, findings = _read_deployments(application, config)
    found = (*tuning_findings(config, deployed, where, cores), *timing_findings(deployed, file))
    return [*findings, *found, *exposure_findings(config, file, where)]


def _read_deployments(application: Application, config: AppConfig) -> tuple[Deployed, list[Finding]]:
    """The settings of every deployment that the application has, and what is wrong with the file's entries."""
    deployed = Deployed()
    readers = _readers(config, deployed)
    findings: list[Finding] = []
    for entry in application.deployments:
        reader = readers.get(entry.name)
        if reader is None:
            known = ", ".join(readers)
            findings.append(Finding(f"{entry.where}.name", f"no deployment {entry.name!r}; there are: {known}"))
            continue
        deployed.entries[entry.name] = entry
        try:
            reader(entry.user_config, f"{entry.where}.user_config")
        except ConfigError as error:
            findings += [_from_line(line) for line in error.message.splitlines()]
    return deployed, findings


Reader = Callable[[object, str], None]


def _readers(config: AppConfig, deployed: Deployed) -> dict[str, Reader]:
    """What `user_config` of each deployment means, by the names that the application's builder gives them."""

    def read_ingress(raw: object, where: str) -> None:
        deployed.ingress = parse(IngressSettings, raw, where)

    def read_model(model: ModelConfig) -> Reader:
        def read(raw: object, where: str) -> None:
            deployed.models[model.name] = parse(ModelSettings, raw, where)

        return read

    return {"ingress": read_ingress, **dict(_tiers(config, read_model))}


def _tiers(config: AppConfig, read_model: Callable[[ModelConfig], Reader]) -> Iterator[tuple[str, Reader]]:
    for model in config.models:
        yield f"{model.name}-tokenizer", _read_nothing
        yield f"{model.name}-model", read_model(model)


def _read_nothing(raw: object, where: str) -> None:
    if raw:
        raise ConfigError(f"{where}: this deployment takes none; its settings are in args")


def _from_line(line: str) -> Finding:
    key, _, reason = line.partition(": ")
    return Finding(key, reason)
