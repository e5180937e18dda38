"""The actor that holds back a deployment's replicas until every node has its models.

Serve pickles this module by value and unpickles it, with the arguments, in its controller, where this package may
not be installed. So nothing of the package is imported at the top, and the arguments are plain JSON values.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray

END_AFTER_S = 30.0
"""From when the gate is open: Serve's controller, which looks twice a second, has long seen it then."""


@ray.remote(num_cpus=0)
class WarmGate:
    """Ready once every node alive has every model; the deployment's first replica is created only then.

    Then it ends, so that its process takes no memory while the models are served. RAY_SERVE_DEPLOYMENT_ACTOR_HEALTH_
    CHECK_PERIOD_S keeps Serve from noticing. Where that is not set, Serve makes the gate again, and this one stays.
    """

    async def __init__(self, models: list[dict[str, Any]], cache: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        from serve_app.cache.warmer import open_gate

        if await open_gate(models, cache):
            self.ending = asyncio.create_task(self.end())

    async def end(self) -> None:
        await asyncio.sleep(END_AFTER_S)
        ray.kill(ray.get_runtime_context().current_actor)
