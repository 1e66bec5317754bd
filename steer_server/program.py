"""What a request asks of the model's features: edits, where and when they apply, and read-outs."""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from steer_server.dictionary.edits import Edit, Patch
from steer_server.errors import InvalidRequest

ENTRY_BYTES = 8
"""A feature index and its activation, four bytes each."""
MAX_RELATIVE_SIZE = 1e4
"""Largest |delta| / |x| of any token. Past some 1e13 the squares in the next norm overflow, and a NaN in a KV block
would outlive its request: vLLM does not clear blocks that it hands on."""


@dataclass(frozen=True)
class Scope:
    """The positions at which an edit applies. Excludes always win.

    A position counts from 0 at the first prompt token; a generated token's position follows on. Negative ones count
    from the prompt's end, -1 being its last token, until `resolve` makes them absolute. Position 0 is
    excluded by default because its residual norm is an outlier (attention sink).
    """

    prompt: bool = True
    generated: bool = True
    positions: frozenset[int] = frozenset()
    """With `windows`, the only positions it holds at; both empty: it holds at all."""
    windows: tuple[tuple[int, int | None], ...] = ()
    """Half-open; an end of None is no end."""
    token_ids: frozenset[int] = frozenset()
    """It holds only where the model reads one of these tokens; empty: any."""
    exclude_positions: frozenset[int] = frozenset({0})
    exclude_token_ids: frozenset[int] = frozenset()

    @property
    def reads_tokens(self) -> bool:
        """Whether it depends on which token is at a position."""
        return bool(self.token_ids or self.exclude_token_ids)

    @property
    def reads_phase(self) -> bool:
        """Whether it depends on where the prompt ends, once resolved."""
        return self.prompt != self.generated

    @cached_property
    def counts_back(self) -> bool:
        """Whether some position counts from the prompt's end."""
        ends = [end for window in self.windows for end in window if end is not None]
        return min((*self.positions, *self.exclude_positions, *ends), default=0) < 0

    @cached_property
    def edges(self) -> frozenset[int]:
        """The positions where, but for tokens and the prompt's end, it may begin or cease to hold."""
        single = self.positions | self.exclude_positions
        ends = {end for window in self.windows for end in window if end is not None}
        return frozenset({*single, *(position + 1 for position in single), *ends})

    @cached_property
    def canonical(self) -> str:
        """The same text for equal scopes only."""
        content = [
            [self.prompt, self.generated, sorted(self.windows, key=str)],
            [sorted(self.positions), sorted(self.token_ids)],
            [sorted(self.exclude_positions), sorted(self.exclude_token_ids)],
        ]
        return msgspec.json.encode(content).decode()

    def resolve(self, prompt_length: int, *, field: str = "scope") -> "Scope":
        """The same with absolute positions; InvalidRequest for one before the prompt's start."""
        if not self.counts_back:
            return self

        def absolute(position: int, where: str) -> int:
            if position < -prompt_length:
                raise InvalidRequest(
                    f"position {position} lies before a prompt of {prompt_length} tokens",
                    field=f"{field}.{where}",
                )
            return position if position >= 0 else prompt_length + position

        return replace(
            self,
            positions=frozenset(absolute(p, "positions") for p in self.positions),
            windows=tuple(
                (absolute(a, "windows"), None if b is None else absolute(b, "windows"))
                for a, b in self.windows
            ),
            exclude_positions=frozenset(
                absolute(p, "exclude_positions") for p in self.exclude_positions
            ),
        )

    def holds(self, position: int, prompt_length: int, token: int) -> bool:
        """Whether it holds at the position, where the model reads `token`; once resolved."""
        if not (self.prompt if position < prompt_length else self.generated):
            return False
        if position in self.exclude_positions or token in self.exclude_token_ids:
            return False
        if self.token_ids and token not in self.token_ids:
            return False
        if not (self.positions or self.windows) or position in self.positions:
            return True
        starts, ends = self._merged_windows
        window = bisect_right(starts, position) - 1
        return window >= 0 and position < ends[window]

    @cached_property
    def _merged_windows(self) -> tuple[list[int], list[float]]:
        """Where the windows begin and end, in order and apart from each other; once resolved."""
        starts, ends = list[int](), list[float]()
        for first, stop in sorted(self.windows, key=itemgetter(0)):
            end = math.inf if stop is None else stop
            if starts and first <= ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                starts.append(first)
                ends.append(end)
        return starts, ends


EVERYWHERE = Scope()
"""But at position 0. What is known of one object serves all edits that have it."""


class Where(NamedTuple):
    """Where an edit is to run, its condition aside. Positions are absolute."""

    scope: Scope
    patched: frozenset[int] | None
    """The positions of a Patch; None: it is another edit."""

    def holds(self, position: int, prompt_length: int, token: int) -> bool:
        """Whether it runs at the position, where the model reads `token`."""
        here = self.patched is None or position in self.patched
        return here and self.scope.holds(position, prompt_length, token)

    def holds_somewhere(self, rows: int, prompt_length: int) -> bool:
        """Whether it may run at one of the positions 0..rows - 1, whatever tokens come."""
        where = self
        if self.scope.reads_tokens:
            free = replace(self.scope, token_ids=frozenset(), exclude_token_ids=frozenset())
            where = self._replace(scope=free)
        starts = {0, prompt_length, *self.edges}
        return any(where.holds(p, prompt_length, -1) for p in starts if 0 <= p < rows)

    @property
    def edges(self) -> frozenset[int]:
        """As `Scope.edges`. Each position of a Patch stands alone, since each has its own value."""
        patched = self.patched or frozenset()
        return self.scope.edges.union(patched, (position + 1 for position in patched))

    def runs(
        self, start: int, stop: int, prompt_length: int, token_ids: Sequence[int]
    ) -> Iterator[tuple[int, int]]:
        """The positions of [start, stop) at which it runs, as [first, last) one after the other.

        `token_ids` are those at these positions, which only a scope that reads tokens looks at.
        """
        reads = self.scope.reads_tokens
        if reads:
            cuts = range(start, stop + 1)
        else:
            edges = {prompt_length, *self.edges}
            cuts = sorted({start, stop, *(edge for edge in edges if start < edge < stop)})
        for first, last in pairwise(cuts):
            if self.holds(first, prompt_length, token_ids[first - start] if reads else -1):
                yield first, last


@dataclass(frozen=True)
class Condition:
    """Holds at the tokens where a feature's activation, before any edit, is above a value.

    The feature is of a dictionary at the same site as the edit; the edited feature itself will do.
    """

    dictionary: str
    feature: int
    above: float = 0.0


@dataclass(frozen=True)
class FeatureEdit:
    """One edit of one dictionary's feature, strengths resolved to activations."""

    dictionary: str
    edit: Edit
    scope: Scope = EVERYWHERE
    when: Condition | None = None

    def resolve(self, prompt_length: int, *, field: str = "edit") -> "FeatureEdit":
        """The same with absolute positions, as `Scope.resolve`."""
        edit = self.edit
        scope = self.scope.resolve(prompt_length, field=f"{field}.scope")
        if scope is self.scope and not isinstance(edit, Patch):
            return self
        if isinstance(edit, Patch):
            listed = Scope(positions=frozenset(position for position, _ in edit.values))
            listed = listed.resolve(prompt_length, field=f"{field}.patch")
            if len(listed.positions) < len(edit.values):
                raise InvalidRequest(
                    f"names a position twice, one of them from the end of a prompt of {prompt_length} tokens",
                    field=f"{field}.patch.positions",
                )
            values = ((p if p >= 0 else prompt_length + p, value) for p, value in edit.values)
            edit = Patch(edit.feature, tuple(sorted(values)))
        return replace(self, edit=edit, scope=scope)

    @property
    def where(self) -> Where:
        """Where it is to run, once resolved."""
        patch = self.edit.values if isinstance(self.edit, Patch) else None
        return Where(self.scope, None if patch is None else frozenset(p for p, _ in patch))


@dataclass(frozen=True)
class ReadOut:
    """Activations to return: the `top_k` strongest of each row, exactly `features`, or all `above` a value.

    One of the three is set. A row is a position; one that was read out is never reported twice.
    """

    dictionary: str
    top_k: int = 0
    features: tuple[int, ...] = ()
    above: float | None = None
    """At least 0; the strongest ones that `row_bytes` has room for."""
    row_bytes: int = 1024
    """Budget of a row for `above`, at `ENTRY_BYTES` per feature."""
    prompt: bool = True
    generated: bool = True
    edited: bool = False
    """Of x after the request's edits at the site instead of before them."""
    complete: bool = True
    """Prompt rows are computed even where the prefix cache holds them; else those are left out."""

    @property
    def limit(self) -> int:
        """Features per row at most."""
        return len(self.features) or self.top_k or self.row_bytes // ENTRY_BYTES


class Oversize(StrEnum):
    """What becomes of a token that a program's edits would move past its limit."""

    REJECT = "reject"
    """The generation ends with EditTooLarge."""
    CLAMP = "clamp"
    """The sum of the edits' deltas is scaled down to the limit."""
    WARN = "warn"
    """It is moved all the same, and counted."""


@dataclass(frozen=True)
class Program:
    """All edits and read-outs of one request, resolved and checked."""

    edits: tuple[FeatureEdit, ...] = ()
    read_outs: tuple[ReadOut, ...] = ()
    max_relative_size: float | None = None
    """Limit of |delta| / |x| at each token and site, delta being the sum over the edits there; above 0 and below
    `MAX_RELATIVE_SIZE`, which holds without it, too."""
    oversize: Oversize = Oversize.REJECT
    """What happens past `max_relative_size`."""

    def __deepcopy__(self, memo: Any) -> "Program":
        """Itself, since nothing of it changes: vLLM copies what each request brings."""
        return self

    @cached_property
    def groups(self) -> dict[Where, list[int]]:
        """The indices of its edits by where they run; most edits of a program run at the same places."""
        found: dict[Where, list[int]] = {}
        scope, indices = None, []
        for index, entry in enumerate(self.edits):
            if isinstance(entry.edit, Patch):
                found.setdefault(entry.where, []).append(index)
                continue
            # To make a `Where` and find it takes longer than all else.
            if entry.scope is not scope:
                scope, indices = entry.scope, found.setdefault(entry.where, [])
            indices.append(index)
        return found

    @cached_property
    def edges(self) -> set[int]:
        """As `Where.edges`, of all its edits."""
        return set().union(*(where.edges for where in self.groups))

    @cached_property
    def reads_tokens(self) -> bool:
        """Whether where its edits run depends on which token is at a position."""
        return any(where.scope.reads_tokens for where in self.groups)

    @cached_property
    def patches(self) -> bool:
        """Whether some edit has a value for each position."""
        return any(where.patched is not None for where in self.groups)

    def resolve(self, prompt_length: int) -> "Program":
        """The same with absolute positions; InvalidRequest names one that lies before the prompt."""
        if not self.patches and not any(where.scope.counts_back for where in self.groups):
            return self
        edits = (
            entry.resolve(prompt_length, field=f"edits[{index}]")
            for index, entry in enumerate(self.edits)
        )
        return replace(self, edits=tuple(edits))

    @cached_property
    def features(self) -> frozenset[tuple[str, int]]:
        """(dictionary, feature) of all that its edits need at hand in the worker."""
        conditions = (entry.when for entry in self.edits if entry.when is not None)
        return frozenset(
            [(entry.dictionary, entry.edit.feature) for entry in self.edits]
            + [(when.dictionary, when.feature) for when in conditions]
        )

    def dictionaries(self) -> set[str]:
        """The names of all that it names."""
        read = {read_out.dictionary for read_out in self.read_outs}
        return read | {name for name, _ in self.features}

    def digest(self, hashes: Mapping[str, str]) -> str:
        """The same only for equal edits under an equal limit, in whatever order they came; positions are absolute.

        `hashes` maps dictionary names to `Card.arithmetic`.
        """
        content: list[Any] = [sorted(_canonical(entry, hashes) for entry in self.edits)]
        # Blocks made without the limit say nothing of whether it was kept.
        if self.max_relative_size is not None and self.oversize is not Oversize.WARN:
            content += [self.max_relative_size, self.oversize]
        return _hash(content)

    def cache_salt(self, digest: str, prompt_length: int, nonce: str = "") -> str | None:
        """Names the KV blocks that requests with this `digest` may share; None without edits.

        Where an edit tells the phases apart, a token that one request generated and the next one has in its prompt is
        not the same, so the prompt's length counts, too.
        """
        if not self.edits and not nonce:
            return None
        phases = any(where.scope.reads_phase for where in self.groups)
        return _hash([digest, prompt_length if phases else None, nonce])


def _hash(content: Any) -> str:
    return hashlib.sha256(msgspec.msgpack.encode(content)).hexdigest()


def _canonical(entry: FeatureEdit, hashes: Mapping[str, str]) -> list[Any]:
    """Any two can be put in order: those of one kind have values of the same types."""
    edit, when = entry.edit, entry.when
    condition = "" if when is None else f"{hashes[when.dictionary]} {when.feature} {when.above!r}"
    kind, values = type(edit).__name__, (getattr(edit, field.name) for field in fields(edit))
    return [hashes[entry.dictionary], kind, *values, condition, entry.scope.canonical]
