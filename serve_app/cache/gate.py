"""The actor that holds back a deployment's replicas until every node has its models.

Serve pickles this module by value and unpickles it, with the arguments, in its controller, where this package may
not be installed. So nothing of the package is imported at the top, and the arguments are plain JSON values.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray


@ray.remote(num_cpus=0)
class WarmGate:
    """Ready once every node alive has every model; the deployment's first replica is created only then.

    From then on it keeps the warmer alive, which warms nodes that join later.
    """

    async def __init__(self, models: list[dict[str, Any]], cache: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        from serve_app.cache.warmer import keep_warm, open_gate

        await open_gate(models, cache)
        self.keeping = asyncio.create_task(keep_warm(models, cache))
