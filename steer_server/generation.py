"""A generation as the API sees it: what goes into the engine and what comes out, step by step."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from steer_server.dictionary.files import StoredDictionary
from steer_server.program import Program


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the fields mean what they mean in vLLM."""

    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 considers every token."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    """Return the log-probability of each generated token under the edited model."""


@dataclass(frozen=True)
class Generation:
    """One request to the engine. `request_id` is unique among running requests."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    program: Program = field(default_factory=Program)
    live: bool = False
    """Its program may be updated while it runs; its KV blocks are shared with nobody."""


@dataclass(frozen=True, eq=False)
class ActivationRows:
    """Sparse activations of one read-out; row i is `positions[i]`.

    Its features are `features[row_splits[i] : row_splits[i + 1]]`, strongest first for `top_k`, in the order asked
    for otherwise; `values` aligns with `features`. Only non-zero activations are listed.
    """

    read_out: int
    """Index into the program's read-outs, of the revision that held when the row was computed."""
    dictionary: str
    positions: NDArray[np.uint32]
    row_splits: NDArray[np.uint32]
    features: NDArray[np.uint32]
    values: NDArray[np.float32]
    active: NDArray[np.uint32] | None
    """Number of active features per row (L0), known when the row was encoded at full width."""


@dataclass(frozen=True)
class RevisionApplied:
    """From generated token `first_index` on, tokens are sampled under program `revision`."""

    revision: int
    first_index: int


@dataclass(frozen=True)
class EditReport:
    """Proof of what one edit did, measured inside the model's forward pass."""

    revision: int
    edit: int
    """Index into that revision's edits."""
    tokens_in_scope: int
    """Rows on which the edit was evaluated."""
    tokens_changed: int
    """Rows on which it changed the feature's activation."""
    mean_relative_size: float
    """|delta| / |x| of this edit alone, mean over the rows in scope."""
    max_relative_size: float


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True)
class Finish:
    """The end of a generation."""

    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    """Prompt tokens taken from the prefix cache instead of being computed."""
    reports: tuple[EditReport, ...]


@dataclass(frozen=True, eq=False)
class StepOutput:
    """What one or more engine steps added. Nothing is sent twice."""

    first_index: int
    """Index of `token_ids[0]` among the generated tokens, from 0."""
    token_ids: tuple[int, ...]
    text: str
    """Added text; it may lag the tokens until a character is complete."""
    logprobs: tuple[float, ...] = ()
    activations: tuple[ActivationRows, ...] = ()
    applied: tuple[RevisionApplied, ...] = ()
    encode_seconds: dict[str, float] = field(default_factory=dict)
    """Time the worker spent encoding for read-outs in these steps, by dictionary, whole batch."""
    finish: Finish | None = None


class Tokenizer(Protocol):
    """The model's tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Every id of the model is below it."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as it would be printed, spaces kept."""
        ...


@dataclass(frozen=True)
class SlotLoad:
    """How full the engine is of features in use; a program waits for slots as a request waits for KV blocks."""

    used: Mapping[str, int]
    """By site."""
    capacity: int
    """Of each site."""
    held: int
    """Requests and updates that wait for slots."""


class Engine(Protocol):
    """A model that generates under programs."""

    model_id: str
    max_model_len: int
    """Prompt and generated tokens together."""
    max_num_seqs: int
    """Requests computed together; more wait."""
    d_model: int
    tokenizer: Tokenizer
    self_test_passed: bool

    @property
    def alive(self) -> bool: ...

    @property
    def slot_load(self) -> SlotLoad:
        """As of the last step that the engine told of."""
        ...

    async def add_dictionary(self, name: str, stored: StoredDictionary) -> None:
        """Makes the dictionary resident while generations go on; DictionaryMismatch if model or sites do not fit."""
        ...

    async def remove_dictionary(self, name: str) -> None:
        """Takes a resident dictionary away; DictionaryInUse if a running generation names it."""
        ...

    def generate(self, generation: Generation) -> AsyncIterator[StepOutput]:
        """The outputs in order; the last has `finish`. Closing the iterator aborts the generation.

        Waits while the features it edits find no free slot. EditNotApplied when an edit provably did not run.
        """
        ...

    async def update(self, request_id: str, program: Program) -> int:
        """Replaces the program of a live generation and returns the new revision, counted from 1.

        The change is acknowledged by `StepOutput.applied`, or not at all if the generation ends first; InvalidRequest if
        it is not live or has ended.
        """
        ...

    async def shutdown(self) -> None: ...
