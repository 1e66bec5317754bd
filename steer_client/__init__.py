"""Python client and command line for a steer server."""

from steer_client.admin import AdminClient
from steer_client.channel import Tls
from steer_client.client import SteerClient
from steer_client.edits import (
    Feature,
    ablate,
    active,
    add,
    clamp,
    limit,
    patch,
    read,
    read_above,
    read_top,
    scale,
    size_limit,
)
from steer_client.errors import CallFailed
from steer_client.generation import Options
from steer_client.live import LiveSession, rejection
from steer_client.rows import Row, rows

__all__ = [
    "AdminClient",
    "CallFailed",
    "Feature",
    "LiveSession",
    "Options",
    "Row",
    "SteerClient",
    "Tls",
    "ablate",
    "active",
    "add",
    "clamp",
    "limit",
    "patch",
    "read",
    "read_above",
    "read_top",
    "rejection",
    "rows",
    "scale",
    "size_limit",
]
