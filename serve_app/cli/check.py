"""`serve-app check`: everything that can be known wrong about a configuration before a cluster starts.

Serve ignores keys that it does not know, so a misspelled one silently keeps its default; and what the application
itself refuses shows up only in a replica's log. Here each is one line: file, key, reason.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from serve_app.cli.exposure import exposure_findings, still_open
from serve_app.cli.serve_file import Application, Finding, ServeFile, parse_file
from serve_app.cli.tuning import Deployed, ModelEntry, timing_findings, tuning_findings
from serve_app.config import (
    BUILDER,
    MODEL_BUILDER,
    IngressConfig,
    IngressSettings,
    ModelAppConfig,
    ModelConfig,
    ModelSettings,
    model_deployment,
    name_clashes,
    parse,
    tokenizer_deployment,
)
from serve_app.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", default=Path("serve_config.yaml"), help="the file to check")


def run(args: argparse.Namespace) -> int:
    errors = show(args.config, check_file(args.config))
    if errors:
        print(f"{args.config}: {errors} error{'s' if errors > 1 else ''}", file=sys.stderr)
        return 1
    print(f"{args.config}: no errors")
    file, _ = parse_file(args.config)
    open_all_the_same = None if file is None else still_open(file)
    if open_all_the_same is not None:
        print(f"{args.config}: {open_all_the_same}")
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
    deployed = Deployed()
    for application in file.applications:
        findings += _check_application(application, file, deployed)
    tuned = tuning_findings(deployed, cores or os.cpu_count() or 1)
    return [*findings, *_together(file, deployed), *tuned, *timing_findings(deployed, file)]


def _check_application(application: Application, file: ServeFile, deployed: Deployed) -> list[Finding]:
    """What is wrong with one application by itself; its settings go to `deployed`."""
    where = f"{application.where}.args"
    try:
        if application.import_path == BUILDER:
            config = parse(IngressConfig, application.args, where)
            found = list(exposure_findings(config, file, where))
            return [*_read_deployments(application, _ingress_reader(deployed), deployed), *found]
        if application.import_path == MODEL_BUILDER:
            model = parse(ModelAppConfig, application.args, where).model
            deployed.models.append(ModelEntry(model, f"{where}.model"))
            return _read_deployments(application, _model_readers(model, deployed), deployed)
    except ConfigError as error:
        return list(_from_lines(error))
    return []


def _together(file: ServeFile, deployed: Deployed) -> Iterator[Finding]:
    """What is wrong with our applications beside each other."""
    ours = [one for one in file.applications if one.import_path in (BUILDER, MODEL_BUILDER)]
    models = [one for one in ours if one.import_path == MODEL_BUILDER]
    for one in models:
        if one.route_prefix is not None:
            reason = "write null: clients reach a model through the ingress application, and only through it"
            yield Finding(f"{one.where}.route_prefix", reason)
    if models and len(ours) == len(models):
        yield Finding("applications", f"no application has import_path {BUILDER}: nothing would answer clients")
    if ours and not models:
        reason = f"no application has import_path {MODEL_BUILDER}: no model would be served"
        yield Finding("applications", reason, is_error=False)
    for name in name_clashes([served.config for served in deployed.models]):
        yield Finding("applications", f"{name} is a name or alias of two models; each leads to one")
    caches = {json.dumps((one.args or {}).get("cache"), sort_keys=True) for one in ours}
    if len(caches) > 1:
        reason = "cache differs between applications; write it once (&cache) and repeat it (*cache)"
        yield Finding("applications", reason, is_error=False)


Reader = Callable[[object, str], None]


def _read_deployments(application: Application, readers: dict[str, Reader], deployed: Deployed) -> list[Finding]:
    """Put the settings of the application's deployments into `deployed`; what is wrong with the file's entries."""
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
            findings += _from_lines(error)
    return findings


def _ingress_reader(deployed: Deployed) -> dict[str, Reader]:
    def read(raw: object, where: str) -> None:
        deployed.ingress = parse(IngressSettings, raw, where)

    return {"ingress": read}


def _model_readers(model: ModelConfig, deployed: Deployed) -> dict[str, Reader]:
    """What `user_config` of each of a model's deployments means, by the names that `build_model` gives them."""

    def read(raw: object, where: str) -> None:
        deployed.settings[model.name] = parse(ModelSettings, raw, where)

    return {tokenizer_deployment(model.name): _read_nothing, model_deployment(model.name): read}


def _read_nothing(raw: object, where: str) -> None:
    if raw:
        raise ConfigError(f"{where}: this deployment takes none; its settings are in args")


def _from_lines(error: ConfigError) -> Iterator[Finding]:
    """A line for each key; a reason of several lines goes on at an indented one."""
    for line in re.split(r"\n(?=\S)", error.message):
        key, _, reason = line.partition(": ")
        yield Finding(key, reason)
