"""Serve's REST interface, which a Ray cluster has at its dashboard: what is deployed, how it fares, and what is to be.

Ray's own `serve status` and `serve deploy` ask the same, but show no token unless RAY_AUTH_MODE is set; a cluster that
`serve run` starts asks for one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from serve_app.errors import ServeAppError
from serve_app.ingress.reach import is_loopback

RUNNING = "RUNNING"
"""Status of an application, and state of a replica, of which nothing is to be done."""

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_APPLICATIONS = "/api/serve/applications/"
_TIMEOUT_S = 30.0
_REFUSED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


class DashboardError(ServeAppError):
    """The dashboard does not answer, or refuses what it is asked."""


def add_address_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_DASHBOARD_ADDRESS", DEFAULT_ADDRESS),
        help=f"Ray's dashboard, as `serve-app serve` prints it (default: RAY_DASHBOARD_ADDRESS, or {DEFAULT_ADDRESS})",
    )


class Dashboard:
    """The dashboard at an address. Each method raises DashboardError if it gets no answer, or none that it can use."""

    def __init__(self, address: str) -> None:
        if "://" not in address:
            address = f"http://{address}"
        self.address = address.rstrip("/")
        try:
            host = urlsplit(self.address).hostname or ""
        except ValueError as error:
            raise DashboardError(f"{address} is no address of a Ray dashboard: {error}") from error
        self._trust_env = not is_loopback(host)  # a proxy for the outside cannot lead to this machine

    def details(self) -> dict[str, Any]:
        """Serve's own account of itself, a `ServeInstanceDetails`: `http_options`, `applications` and more."""
        details = self._ask("GET")
        if not isinstance(details, dict) or not isinstance(details.get("applications"), dict):
            raise DashboardError(f"{self.address} does not answer as a Ray dashboard does")
        return details

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Ask for what a Serve config file says. Serve answers at once, and then begins with it."""
        self._ask("PUT", config)

    def _ask(self, method: str, body: object = None) -> Any:
        url = f"{self.address}{_APPLICATIONS}"
        try:
            answer = httpx.request(
                method, url, json=body, headers=_token(), timeout=_TIMEOUT_S, trust_env=self._trust_env
            )
            if answer.status_code in _REFUSED:
                raise DashboardError(
                    f"the Ray cluster at {self.address} asks for a token, and refuses the one that is here. Put its "
                    "own into ~/.ray/auth_token, or name it with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
                )
            if not answer.is_success:
                raise DashboardError(f"{self.address} answers {answer.status_code}: {answer.text.strip()}")
            return answer.json() if answer.content else None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise DashboardError(
                f"no Ray dashboard answers at {self.address} ({error}). Start a server, or name the dashboard of the "
                "one that is meant with --address"
            ) from error
        except ValueError as error:
            raise DashboardError(f"{self.address} does not answer as a Ray dashboard does") from error


def tiers(name: str, application: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The deployments of an application of `details`, but for the root of a model's, which never has a replica."""
    for deployment, state in application["deployments"].items():
        if deployment != name or state["target_num_replicas"] or state["replicas"]:
            yield deployment, state


def running(state: Mapping[str, Any]) -> str:
    """How many replicas of a deployment run, as "1 of 2"."""
    count = sum(replica["state"] == RUNNING for replica in state["replicas"])
    return f"{count} of {state['target_num_replicas']}"


def failures(application: Mapping[str, Any]) -> Iterator[str]:
    """Why an application of `details` cannot be deployed; nothing if it can."""
    if application["status"] == "DEPLOY_FAILED":
        yield application["message"]
        yield from (d["message"] for d in application["deployments"].values() if d["status"] == "DEPLOY_FAILED")


def _token() -> dict[str, str]:
    """The header that opens a Ray cluster with token authentication, from where Ray itself looks for the token."""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token and file.is_file():
        token = file.read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}
