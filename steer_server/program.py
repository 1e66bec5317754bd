"""What a request asks of the model's features: edits, where they apply, and read-outs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from steer_server.dictionary.edits import Edit


@dataclass(frozen=True)
class Scope:
    """The positions at which an edit applies. Excludes always win.

    A position counts from 0 at the first prompt token; a generated token's position follows on.
    Position 0 is excluded by default because its residual norm is an outlier (attention sink).
    """

    prompt: bool = True
    generated: bool = True
    exclude_positions: frozenset[int] = frozenset({0})

    def holds(self, position: int, prompt_length: int) -> bool:
        phase = self.prompt if position < prompt_length else self.generated
        return phase and position not in self.exclude_positions


@dataclass(frozen=True)
class FeatureEdit:
    """One edit of one dictionary's feature, strengths resolved to activations."""

    dictionary: str
    edit: Edit
    scope: Scope = field(default_factory=Scope)


@dataclass(frozen=True)
class ReadOut:
    """Activations to return: the `top_k` strongest of each row, or exactly `features`.

    They are those of the unedited x. A row is a position; one that was read out is never reported twice.
    """

    dictionary: str
    top_k: int = 0
    features: tuple[int, ...] = ()
    prompt: bool = True
    generated: bool = True
    complete: bool = True
    """Prompt rows are computed even where the prefix cache holds them; else those are left out."""


@dataclass(frozen=True)
class Program:
    """All edits and read-outs of one request, resolved and checked."""

    edits: tuple[FeatureEdit, ...] = ()
    read_outs: tuple[ReadOut, ...] = ()

    def cache_salt(self, hashes: Mapping[str, str], nonce: str = "") -> str | None:
        """Names the KV blocks that requests with these edits may share; None without edits.

        `hashes` maps dictionary names to `Card.arithmetic`. Equal edits give equal salts, in whatever order they came.
        """
        if not self.edits and not nonce:
            return None
        canonical = sorted(
            (
                hashes[entry.dictionary],
                type(entry.edit).__name__,
                sorted(vars(entry.edit).items()),
                [entry.scope.prompt, entry.scope.generated, sorted(entry.scope.exclude_positions)],
            )
            for entry in self.edits
        )
        return hashlib.sha256(json.dumps([canonical, nonce]).encode()).hexdigest()
