"""The actor that holds back a deployment's replicas until every node has its models.

Serve pickles this module by value and unpickles it, with the arguments, in its controller, where this package may
not be installed. So nothing of the package is imported at the top, and the arguments are plain JSON values.
"""

from __future__ import annotations

from typing import Any

import ray


@ray.remote(num_cpus=0)
class WarmGate:
    """Ready once every node alive has every model; the deployment's first replica is created only then."""

    async def __init__(self, models: list[dict[str, Any]], cache: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        from serve_app.cache.warmer import open_gate

        self.warmer = await open_gate(models, cache)
