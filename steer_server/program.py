"""What a request asks of the model's features: edits, where and when they apply, and read-outs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from steer_server.dictionary.edits import Edit, Patch
from steer_server.errors import InvalidRequest

ENTRY_BYTES = 8
"""A feature index and its activation, four bytes each."""


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

    def resolve(self, prompt_length: int, *, field: str = "scope") -> "Scope":
        """The same with absolute positions; InvalidRequest for one before the prompt's start."""

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

    def mask(
        self, start: int, stop: int, prompt_length: int, token_ids: Sequence[int] = ()
    ) -> NDArray[np.bool_]:
        """Whether it holds at each position of [start, stop), whose tokens are `token_ids`."""
        position = np.arange(start, stop)
        held = np.where(position < prompt_length, self.prompt, self.generated)
        if self.positions or self.windows:
            listed = np.isin(position, list(self.positions))
            for first, end in self.windows:
                listed |= (position >= first) & (True if end is None else position < end)
            held &= listed
        if self.token_ids:
            held &= np.isin(token_ids, list(self.token_ids))
        if self.exclude_token_ids:
            held &= ~np.isin(token_ids, list(self.exclude_token_ids))
        return held & ~np.isin(position, list(self.exclude_positions))

    def edges(self) -> set[int]:
        """The positions where, but for tokens and the prompt's end, it may begin or cease to hold."""
        single = self.positions | self.exclude_positions
        ends = {end for window in self.windows for end in window if end is not None}
        return {*single, *(position + 1 for position in single), *ends}


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
    scope: Scope = field(default_factory=Scope)
    when: Condition | None = None

    def resolve(self, prompt_length: int, *, field: str = "edit") -> "FeatureEdit":
        """The same with absolute positions, as `Scope.resolve`."""
        edit = self.edit
        if isinstance(edit, Patch):
            listed = Scope(positions=frozenset(position for position, _ in edit.values))
            listed.resolve(prompt_length, field=f"{field}.patch")
            values = ((p if p >= 0 else prompt_length + p, value) for p, value in edit.values)
            edit = Patch(edit.feature, tuple(sorted(values)))
        scope = self.scope.resolve(prompt_length, field=f"{field}.scope")
        return replace(self, edit=edit, scope=scope)

    def without_tokens(self) -> "FeatureEdit":
        """The same wherever a token it names might come."""
        free = replace(self.scope, token_ids=frozenset(), exclude_token_ids=frozenset())
        return replace(self, scope=free)

    def mask(
        self, start: int, stop: int, prompt_length: int, token_ids: Sequence[int] = ()
    ) -> NDArray[np.bool_]:
        """Whether it is to run at each position of [start, stop), its condition aside."""
        held = self.scope.mask(start, stop, prompt_length, token_ids)
        if isinstance(self.edit, Patch):
            held &= np.isin(np.arange(start, stop), [position for position, _ in self.edit.values])
        return held

    def edges(self) -> set[int]:
        """As `Scope.edges`; each position of a Patch stands alone, since each has its own value."""
        found = self.scope.edges()
        if isinstance(self.edit, Patch):
            found |= {position + offset for position, _ in self.edit.values for offset in (0, 1)}
        return found

    def features(self) -> set[tuple[str, int]]:
        """(dictionary, feature) of all whose activation it needs."""
        found = {(self.dictionary, self.edit.feature)}
        if self.when is not None:
            found.add((self.when.dictionary, self.when.feature))
        return found


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


@dataclass(frozen=True)
class Program:
    """All edits and read-outs of one request, resolved and checked."""

    edits: tuple[FeatureEdit, ...] = ()
    read_outs: tuple[ReadOut, ...] = ()

    def resolve(self, prompt_length: int) -> "Program":
        """The same with absolute positions; InvalidRequest names one that lies before the prompt."""
        edits = (
            entry.resolve(prompt_length, field=f"edits[{index}]")
            for index, entry in enumerate(self.edits)
        )
        return replace(self, edits=tuple(edits))

    def features(self) -> set[tuple[str, int]]:
        """(dictionary, feature) of all that its edits need at hand in the worker."""
        return set().union(*(entry.features() for entry in self.edits))

    def cache_salt(
        self, hashes: Mapping[str, str], prompt_length: int, nonce: str = ""
    ) -> str | None:
        """Names the KV blocks that requests with these edits may share; None without edits.

        `hashes` maps dictionary names to `Card.arithmetic`; positions are absolute. Equal edits give equal salts, in
        whatever order they came. Where an edit tells the phases apart, a token that one request generated and the
        next one has in its prompt is not the same, so the prompt's length counts, too.
        """
        if not self.edits and not nonce:
            return None
        canonical = sorted(_canonical(entry, hashes) for entry in self.edits)
        phases = any(entry.scope.reads_phase for entry in self.edits)
        content = [canonical, prompt_length if phases else None, nonce]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _canonical(entry: FeatureEdit, hashes: Mapping[str, str]) -> str:
    scope, when = entry.scope, entry.when
    return json.dumps(
        [
            hashes[entry.dictionary],
            type(entry.edit).__name__,
            sorted(vars(entry.edit).items()),
            [scope.prompt, scope.generated, sorted(scope.windows, key=str)],
            [sorted(scope.positions), sorted(scope.token_ids)],
            [sorted(scope.exclude_positions), sorted(scope.exclude_token_ids)],
            None if when is None else [hashes[when.dictionary], when.feature, when.above],
        ]
    )
