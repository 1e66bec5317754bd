"""Exits with 0 if a steer server admits calls, with 1 and the reason if not: healthcheck.py [HOST:PORT]."""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "steer.v1.SteeringService"
_SECONDS = 4


def main() -> None:
    local = f"127.0.0.1:{os.environ.get('STEER_PORT', '50051')}"
    target = sys.argv[1] if len(sys.argv) > 1 else local
    with grpc.insecure_channel(target) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_SECONDS)
        except grpc.RpcError as error:
            sys.exit(f"{target}: {error.code().name}")  # type: ignore[attr-defined]
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        sys.exit(f"{target}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")


if __name__ == "__main__":
    main()
