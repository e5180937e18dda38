"""`serve-app deploy`: put an edited Serve file into force on a running server, and say what becomes of it.

Serve replaces the replicas of every application whose `args` changed, starts applications that are new and ends those
that are gone. An old version answers until the new one has proved itself. If it cannot, Serve would leave the new
configuration in force, by which it could not start an old replica again that is lost; so what was there is put back.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serve_app.cli import check
from serve_app.cli.dashboard import RUNNING, Dashboard, add_address_argument, failures, running, tiers
from serve_app.cli.serve_file import ServeFile, parse_file
from serve_app.errors import ConfigError

POLL_S = 1.0
UNPLACED_AFTER_S = 20.0
"""A replica that has no node by then probably waits for room; a node of an autoscaling cluster may still be coming."""

FAILED = frozenset({"DEPLOY_FAILED", "UNHEALTHY"})

_OUR_ERROR = re.compile(r"serve_app\.errors\.\w+: ")

Details = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, nargs="?", default=Path("serve_config.yaml"), help="the Serve config file to deploy"
    )
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help="seconds to wait (default: 900)")
    parser.add_argument(
        "--keep-failed", action="store_true", help="do not put back what was deployed where the new one fails"
    )
    add_address_argument(parser)


def run(args: argparse.Namespace) -> int:
    """0 once everything in the file runs; 1 if something in it is wrong, cannot be deployed or takes too long."""
    refused = check.run(args)
    if refused:
        return refused
    file, _ = parse_file(args.config)
    assert file is not None, "checked above"
    config = yaml.safe_load(args.config.read_text("utf-8"))
    dashboard = Dashboard(args.address)
    details = dashboard.details()
    check_server(file, details, dashboard.address)
    dashboard.deploy(config)
    rollout = Rollout([application.name for application in file.applications], time.monotonic() + args.timeout)
    failed = rollout.watch(dashboard)
    if failed and not args.keep_failed:
        restored = restored_config(config, rollout.names, failed, details["applications"])
        if restored is not None:
            dashboard.deploy(restored)
            print("What was deployed before is put back; it has answered all the time.", file=sys.stderr)
    return 0 if rollout.is_done else 1


def check_server(file: ServeFile, details: Details, address: str) -> None:
    """Raises ConfigError if another server than the file's is at the dashboard. Serve cannot change its ports."""
    there = (details.get("http_options") or {}).get("port", file.http_port)
    if there != file.http_port:
        raise ConfigError(
            f"the server at {address} answers HTTP on port {there}, and the file says {file.http_port}: name the "
            "dashboard of the server that is meant with --address, or start the server anew to change its port"
        )


@dataclass(slots=True)
class Rollout:
    """Applications on their way to what a file says; prints what changes."""

    names: Sequence[str]
    until: float
    """On time.monotonic's clock."""
    is_done: bool = False

    def watch(self, dashboard: Dashboard) -> list[str]:
        """Wait until all run, one has failed or the time is over; the applications that failed."""
        started, told = time.monotonic(), dict[str, str]()
        while True:
            applications = dashboard.details()["applications"]
            here = {name: applications[name] for name in self.names if name in applications}
            for name, application in here.items():
                line = told_of(name, application, time.monotonic() - started)
                if told.get(name) != line:
                    told[name] = line
                    print(f"{name}: {line}", flush=True)
            failed = [name for name, application in here.items() if application["status"] in FAILED]
            self.is_done = len(here) == len(self.names) and all(a["status"] == RUNNING for a in here.values())
            for name in failed:
                print(f"{name} cannot be deployed:", *reasons(here[name]), sep="\n", file=sys.stderr)
            if failed or self.is_done:
                return failed
            if time.monotonic() > self.until:
                print("The roll-out is not over; it goes on without this command.", file=sys.stderr)
                return []
            time.sleep(POLL_S)


def told_of(name: str, application: Details, waited_s: float) -> str:
    """One line: the status, and the replicas of deployments that are not as they are to be."""
    changing = [
        _deployment(deployment, state, waited_s)
        for deployment, state in tiers(name, application)
        if state["status"] != "HEALTHY"
    ]
    return ", ".join([application["status"], *changing])


def _deployment(name: str, state: Details, waited_s: float) -> str:
    unplaced = any(replica["state"] == "STARTING" and not replica.get("node_id") for replica in state["replicas"])
    line = f"{name} {state['status']} ({running(state)} run)"
    if unplaced and waited_s > UNPLACED_AFTER_S:
        asks = (state.get("deployment_config") or {}).get("ray_actor_options") or {}
        needs = " and ".join(
            f"{key} {value:g}" for key, value in asks.items() if key in ("num_cpus", "num_gpus") and value
        )
        line += (
            f"; no node has had room yet ({needs}) for a new replica beside the old ones, which answer meanwhile: free "
            "or add that much, or set max_surge_percent: 0, with which the old ones stop first and requests wait"
        )
    return line


def reasons(application: Details) -> Iterator[str]:
    """Why an application cannot be deployed, or does not run any more."""
    found = [reason for reason in failures(application) if reason]
    found = found or [d["message"] for d in application["deployments"].values() if d["message"]]
    yield from dict.fromkeys(map(in_short, found))


def in_short(reason: str) -> str:
    """Of a traceback that ends in an error which this application raised on purpose, only what that says."""
    said = _OUR_ERROR.split(reason)
    return said[-1].strip() if len(said) > 1 else reason


def restored_config(
    config: Mapping[str, Any], names: Sequence[str], failed: Sequence[str], before: Details
) -> dict[str, Any] | None:
    """`config` with applications that ran before and now fail as they were; None if there are none.

    `names` are those of its applications, in their order.

    An application that is new and fails stays, so that its status tells why.
    """
    old = {
        name: before[name]["deployed_app_config"]
        for name in failed
        if name in before and before[name]["status"] == RUNNING and before[name].get("deployed_app_config")
    }
    if not old:
        return None
    pairs = zip(names, config["applications"], strict=True)
    return {**config, "applications": [old.get(name, application) for name, application in pairs]}
