"""The application of Ray Serve: `serve run serving/ray/app.yaml`. Its `args` are a `Plan`'s, and the settings."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from lorakit.server.engines import vllm
from lorakit.server.on_ray.ingress import Ingress, standing
from lorakit.server.on_ray.plan import Plan, read_plan
from lorakit.server.on_ray.replica import ENGINES, GATEWAY, Engines
from lorakit.server.settings import Settings

MANY = 100_000  # requests that the gateway takes at once: limits are the settings', and the replicas'
HEALTH = 2.0  # seconds between two looks at a replica's health
LEAVING = 15.0  # seconds besides `drain` before Ray ends by force what was asked to leave


def app(args: dict[str, Any]) -> Application:
    """Raises UsageError where an argument is unknown, missing, or can't be."""
    plan, settings = read_plan(args)
    return bound(plan, settings)


def bound(plan: Plan, settings: Settings, key: str = "") -> Application:
    """The gateway with its engines; `key`: one that may do all, where no file holds it."""
    engines: Any = serve.deployment(
        name=ENGINES, max_ongoing_requests=plan.max_ongoing_requests, ray_actor_options=_resources(plan),
        health_check_period_s=HEALTH, graceful_shutdown_timeout_s=settings.drain + LEAVING, **_how_many(plan),
    )(Engines)  # fmt: skip
    gateway: Any = serve.deployment(
        name=GATEWAY, num_replicas=1, max_ongoing_requests=MANY, ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH, graceful_shutdown_timeout_s=settings.drain + LEAVING,
    )(serve.ingress(standing)(Ingress))  # fmt: skip
    application: Application = gateway.bind(plan, settings, key, engines.bind(plan, settings))
    return application


def _resources(plan: Plan) -> dict[str, float]:
    gpus = plan.gpus if plan.gpus is not None else (0.0 if vllm.installed().cpu else vllm.gpus_of_each(plan.vllm))
    return {"num_cpus": plan.cpus, "num_gpus": gpus}


def _how_many(plan: Plan) -> dict[str, Any]:
    if not plan.max_replicas:
        return {"num_replicas": plan.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": plan.replicas, "initial_replicas": plan.replicas, "max_replicas": plan.max_replicas,
            "target_ongoing_requests": plan.target,
        }
    }  # fmt: skip
