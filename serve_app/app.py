"""The application graph: the only place where deployments are bound together."""

from __future__ import annotations

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from serve_app.cache.prewarm import warmer_actors
from serve_app.config import GRACEFUL_SHUTDOWN_S, AppConfig, IngressSettings, ModelConfig, ModelSettings, parse
from serve_app.ingress.deployment import Ingress, ModelHandles
from serve_app.model.deployment import ModelReplica
from serve_app.tokenizer.deployment import TokenizerReplica

MAX_ONGOING_REQUESTS = 1024
"""Wide, because the bounds that matter are the ingress's gate and the model replica's queue, both in our units."""

HEALTH_CHECK_PERIOD_S = 5.0

START_RETRIES = 3
"""Tries of a deployment of which nothing has ever started, its pre-warm included: what 20, Serve's default, would only
tell minutes later (a source that refuses us, a model that cannot be loaded) fails soon. The reason shows at once."""

ROUTER = RequestRouterConfig(request_router_class="serve_app.ingress.router.LeastOutstandingRouter")
"""How the ingress chooses among a tier's replicas."""

LIGHT_TIER_CPUS = 0.2
"""Cores that Ray reserves for an ingress or tokenizer replica: what they use on a small machine, beside the model."""


def build(args: AppConfig) -> Application:
    """The graph ingress -> <model>-tokenizer -> <model>-model. Pure: starts nothing, and may run more than once.

    What stands under `deployments:` in serve_config.yaml overrides the options given here. Serve passes `args:` as it
    stands in the file. Raises ConfigError that names every wrong key and the reason.
    """
    config = parse(AppConfig, args, "args")
    handles = {model.name: _model_tiers(model, config) for model in config.models}
    ingress = serve.deployment(
        serve.ingress(None)(Ingress),
        name="ingress",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        user_config=IngressSettings().model_dump(),
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
        ray_actor_options={"num_cpus": LIGHT_TIER_CPUS},
    )
    return ingress.bind(config, handles)


def _model_tiers(model: ModelConfig, config: AppConfig) -> ModelHandles:
    warm = warmer_actors(config.models, config.cache)
    tokenizer = serve.deployment(
        TokenizerReplica,
        name=f"{model.name}-tokenizer",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        deployment_actors=warm,
        max_constructor_retry_count=START_RETRIES,
        request_router_config=ROUTER,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
        ray_actor_options={"num_cpus": LIGHT_TIER_CPUS},
    )
    tier = serve.deployment(
        ModelReplica,
        name=f"{model.name}-model",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        deployment_actors=warm,
        max_constructor_retry_count=START_RETRIES,
        request_router_config=ROUTER,
        user_config=ModelSettings().model_dump(),
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
        ray_actor_options={"num_cpus": model.num_threads, "num_gpus": 1 if model.device == "cuda" else 0},
    )
    return ModelHandles(tokenizer.bind(model, config.cache), tier.bind(model, config.cache))
