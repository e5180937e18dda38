"""`grpcio-health-checking`, with which Python asks what Kubernetes' probes ask."""

from __future__ import annotations

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from told import ASKED, tell

with grpc.insecure_channel(ASKED["grpc"]) as channel:
    health = HealthStub(channel)
    for name in ("", "tiny"):
        told = health.Check(HealthCheckRequest(service=name), timeout=60)
        watched = next(health.Watch(HealthCheckRequest(service=name), timeout=60))
        tell("health", name, [HealthCheckResponse.ServingStatus.Name(each.status) for each in (told, watched)])
    try:
        health.Check(HealthCheckRequest(service="absent"), timeout=60)
    except grpc.RpcError as error:
        tell("health", "absent", error.code().name)
