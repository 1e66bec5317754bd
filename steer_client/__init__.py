"""Python client and command line for a steer server."""

from steer_client.client import LiveSession, SteerClient, rejection
from steer_client.edits import Feature, ablate, add, clamp, read, read_top, scale
from steer_client.errors import CallFailed
from steer_client.rows import Row, rows

__all__ = [
    "CallFailed",
    "Feature",
    "LiveSession",
    "Row",
    "SteerClient",
    "ablate",
    "add",
    "clamp",
    "read",
    "read_top",
    "rejection",
    "rows",
    "scale",
]
