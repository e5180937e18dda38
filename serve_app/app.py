"""The application graphs: the only place where deployments are bound together.

The ingress is one application, and each model is one beside it. Serve replaces every replica of an application when its
`args` change, so a change of one model touches no other.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from serve_app.cache.prewarm import warmer_actors
from serve_app.config import (
    GRACEFUL_SHUTDOWN_S,
    INGRESS_SLOTS,
    SURGE_PERCENT,
    IngressConfig,
    IngressSettings,
    ModelAppConfig,
    ModelSettings,
    model_deployment,
    parse,
    tokenizer_deployment,
)
from serve_app.ingress.deployment import Ingress
from serve_app.model.deployment import ModelReplica
from serve_app.tokenizer.deployment import TokenizerReplica

TIER_SLOTS = 1024
"""Wide, because the bounds that matter are the ingress's gate and the model replica's queue, both in our units."""

HEALTH_CHECK_PERIOD_S = 5.0

HEALTH_CHECK_TIMEOUT_S = 10.0
"""A replica whose process hangs is replaced after three checks that time out."""

EVERY_REPLICA: dict[str, Any] = {
    "health_check_period_s": HEALTH_CHECK_PERIOD_S,
    "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
    "max_surge_percent": SURGE_PERCENT,
    "graceful_shutdown_timeout_s": GRACEFUL_SHUTDOWN_S,
}

START_RETRIES = 3
"""Tries of a deployment of which nothing has ever started, its pre-warm included: what 20, Serve's default, would only
tell minutes later (a source that refuses us, a model that cannot be loaded) fails soon. The reason shows at once."""

ROUTER = RequestRouterConfig(request_router_class="serve_app.ingress.router.LeastOutstandingRouter")
"""How the ingress chooses among a tier's replicas."""

EVERY_TIER: dict[str, Any] = {
    **EVERY_REPLICA,
    "max_ongoing_requests": TIER_SLOTS,
    "max_constructor_retry_count": START_RETRIES,
    "request_router_config": ROUTER,
}

LIGHT_TIER_CPUS = 0.1
"""Cores that Ray reserves for an ingress or tokenizer replica, which leave most of a small machine to the model."""


def build(args: IngressConfig) -> Application:
    """The application that answers clients. Pure: starts nothing, and may run more than once.

    What stands under `deployments:` in serve_config.yaml overrides the options given here. Serve passes `args:` as it
    stands in the file. Raises ConfigError that names every wrong key and the reason.
    """
    config = parse(IngressConfig, args, "args")
    ingress = serve.deployment(
        serve.ingress(None)(Ingress),
        name="ingress",
        user_config=IngressSettings().model_dump(),
        ray_actor_options={"num_cpus": LIGHT_TIER_CPUS},
        max_ongoing_requests=INGRESS_SLOTS,
        max_queued_requests=INGRESS_SLOTS,
        **EVERY_REPLICA,
    )
    return ingress.bind(config)


def build_model(args: ModelAppConfig) -> Application:
    """The application of one model: its tokenizer and model tiers, which ingress replicas call. As pure as `build`."""
    config = parse(ModelAppConfig, args, "args")
    model = config.model
    tokenizer = serve.deployment(
        TokenizerReplica,
        name=tokenizer_deployment(model.name),
        ray_actor_options={"num_cpus": LIGHT_TIER_CPUS},
        **EVERY_TIER,
    )
    tier = serve.deployment(
        ModelReplica,
        name=model_deployment(model.name),
        # One gate a model: a tokenizer replica, which is light, waits in its constructor for its own node's files.
        deployment_actors=warmer_actors([model], config.cache),
        user_config=ModelSettings().model_dump(),
        ray_actor_options={"num_cpus": model.num_threads, "num_gpus": 1 if model.device == "cuda" else 0},
        **EVERY_TIER,
    )
    root = serve.deployment(
        ModelRoot,
        name=model.name,
        autoscaling_config={"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1},
        ray_actor_options={"num_cpus": 0},
    )
    return root.bind(tokenizer.bind(model, config.cache), tier.bind(model, config.cache))


class ModelRoot:
    """The deployment that Serve wants at the root of an application.

    Nobody calls it, so it has no replica. It cannot be one of the tiers: Serve would open ports for HTTP in each of a
    root's replicas, and behind HAProxy it takes no request router of ours there.
    """

    def __init__(self, *tiers: object) -> None:
        pass
