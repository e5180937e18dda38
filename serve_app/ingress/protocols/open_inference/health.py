"""The messages of gRPC's own health service, `grpc.health.v1.Health`, which Kubernetes' probes and others ask.

From https://github.com/grpc/grpc/blob/master/src/proto/grpc/health/v1/health.proto, made as `messages` makes those of
the Open Inference Protocol, and for the same reasons. `grpcio-health-checking` has these messages too; its servicer is
of no use here, because Serve calls the methods of the ingress class.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

SERVICE = "grpc.health.v1.Health"

FILE = text_format.Parse(
    """
    name: "grpc/health/v1/health.proto" package: "grpc.health.v1" syntax: "proto3"
    message_type {
      name: "HealthCheckRequest"
      field { name: "service" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    }
    message_type {
      name: "HealthCheckResponse"
      field {
        name: "status" number: 1 label: LABEL_OPTIONAL type: TYPE_ENUM
        type_name: ".grpc.health.v1.HealthCheckResponse.ServingStatus"
      }
      enum_type {
        name: "ServingStatus"
        value { name: "UNKNOWN" number: 0 }
        value { name: "SERVING" number: 1 }
        value { name: "NOT_SERVING" number: 2 }
        value { name: "SERVICE_UNKNOWN" number: 3 }
      }
    }
    service {
      name: "Health"
      method {
        name: "Check"
        input_type: ".grpc.health.v1.HealthCheckRequest" output_type: ".grpc.health.v1.HealthCheckResponse"
      }
      method {
        name: "Watch" server_streaming: true
        input_type: ".grpc.health.v1.HealthCheckRequest" output_type: ".grpc.health.v1.HealthCheckResponse"
      }
    }
    """,
    descriptor_pb2.FileDescriptorProto(),
)
_POOL = descriptor_pool.DescriptorPool()
_POOL.AddSerializedFile(FILE.SerializeToString())


def _message(name: str) -> Any:
    made: Any = message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"grpc.health.v1.{name}"))
    made.__module__ = __name__
    return made


HealthCheckRequest = _message("HealthCheckRequest")
HealthCheckResponse = _message("HealthCheckResponse")
SERVING = HealthCheckResponse.SERVING
NOT_SERVING = HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = HealthCheckResponse.SERVICE_UNKNOWN
