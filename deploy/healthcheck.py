"""Exits with 0 if a steer server admits calls, with 1 and the reason if not: healthcheck.py [HOST:PORT].

Of a server with TLS: STEER_HEALTH_CA, PEM authorities that vouch for it; STEER_HEALTH_NAME, the name in its certificate
if that is not HOST; STEER_HEALTH_CERT and STEER_HEALTH_KEY, where it asks for a client's certificate.
"""

import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "steer.v1.SteeringService"
_SECONDS = 4


def main() -> None:
    local = f"127.0.0.1:{os.environ.get('STEER_PORT', '50051')}"
    target = sys.argv[1] if len(sys.argv) > 1 else local
    with _channel(target) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_SECONDS)
        except grpc.RpcError as error:
            sys.exit(f"{target}: {error.code().name}")  # type: ignore[attr-defined]
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        sys.exit(f"{target}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")


def _channel(target: str) -> grpc.Channel:
    files = [os.environ.get(f"STEER_HEALTH_{name}") for name in ("CA", "KEY", "CERT")]
    if not any(files):
        return grpc.insecure_channel(target)
    name = os.environ.get("STEER_HEALTH_NAME")
    credentials = grpc.ssl_channel_credentials(
        *(Path(file).read_bytes() if file else None for file in files)
    )
    options = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.secure_channel(target, credentials, options)


if __name__ == "__main__":
    main()
