"""Python client and command line for a steer server."""

from steer_client.admin import AdminClient
from steer_client.client import LiveSession, SteerClient, rejection
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
)
from steer_client.errors import CallFailed
from steer_client.rows import Row, rows

__all__ = [
    "AdminClient",
    "CallFailed",
    "Feature",
    "LiveSession",
    "Row",
    "SteerClient",
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
]
