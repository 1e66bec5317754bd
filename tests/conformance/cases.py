"""How a bound is passed: a good request with one thing wrong, at each place that takes the message."""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from steer_client import CallFailed
from tests.conformance.contract import Bound
from tests.conformance.requests import refused
from tests.unit.serving import NAME, Serving

Change = Mapping[str, Any]
Ask = Callable[[Serving], Awaitable[CallFailed]]

INVALID, RANGE, MISSING, STATE, FULL, TAKEN, LOST = (
    "INVALID_ARGUMENT",
    "OUT_OF_RANGE",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "RESOURCE_EXHAUSTED",
    "ALREADY_EXISTS",
    "DATA_LOSS",
)


@dataclass(frozen=True)
class Case:
    """One way past a bound."""

    bound: Bound
    rpc: str
    field: str
    """That ErrorInfo and BadRequest name; empty where no value of the request is at fault."""
    ask: Ask

    @property
    def name(self) -> str:
        return f"{self.bound[0]}-{self.bound[1]}-{self.rpc}-{self.field}"


GENERATIONS = (
    ("Generate", "generation"),
    ("GenerateStream", "generation"),
    ("Session", "start_turn.generation"),
    ("Compare", "generation"),
)
_BEGUN = (*GENERATIONS, ("Compare", "arms[0]"), ("Score", ""))
CARRIERS: dict[str, tuple[tuple[str, str], ...]] = {
    "generation": GENERATIONS,
    "edits, begun": _BEGUN,
    "edits": (*_BEGUN, ("Update", "update")),
    "read_outs": (*GENERATIONS, ("Encode", ""), ("Update", "update.read_outs")),
    "prompt": (
        *((rpc, f"{path}.prompt") for rpc, path in GENERATIONS),
        ("Encode", "prompt"),
        ("Score", "prompt"),
        ("Patch", "source"),
        ("Patch", "target"),
        ("Inspect", "prompts[0]"),
        ("Contrast", "positive[0]"),
        ("Contrast", "negative[0]"),
    ),
}
"""Where messages that several RPCs take lie in each: an RPC and the path of what holds them."""


def _under(prefix: str, path: str) -> str:
    return ".".join(part for part in (prefix, path) if part)


def past(name: str, code: str, where: str, change: Change, field: str | None) -> Iterator[Case]:
    """Cases for every place of a shared message, or for the one RPC `where`; paths count from there."""
    for rpc, prefix in CARRIERS.get(where, ((where, ""),)):
        absolute = {_under(prefix, path): value for path, value in change.items()}

        def ask(service: Serving, rpc=rpc, absolute=absolute) -> Awaitable[CallFailed]:
            return refused(service, rpc, absolute)

        yield Case((name, code), rpc, "" if field is None else _under(prefix, field), ask)


Row = tuple[str, str, str, Change, str | None]
"""What names the bound, the code, where the message lies, what is wrong, and which field, if one, is named."""


def edit(**fields) -> dict[str, Any]:
    return {"dictionary": NAME, "feature": 2, **fields}


def scope(**fields) -> Change:
    return {"edits": [edit(ablate={}, scope=fields)]}


def when(**fields) -> Change:
    return {"edits": [edit(ablate={}, when=fields)]}


def patch(positions: list[int], values: list[float], unit: int = 1) -> Change:
    return {"edits": [edit(patch={"positions": positions, "values": values, "unit": unit})]}


def above(**fields) -> Change:
    return {"read_outs": [{"dictionary": NAME, "above": fields}]}


def named(features: list[int]) -> Change:
    return {"read_outs": [{"dictionary": NAME, "features": {"features": features}}]}


def chat(*roles: int) -> Change:
    return {"": {"chat": {"messages": [{"role": role, "content": "a"} for role in roles]}}}
