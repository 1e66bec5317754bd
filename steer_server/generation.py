"""A generation as the API sees it: what goes into the engine and what comes out, step by step."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple, Protocol

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
    prompt_logprobs: bool = False
    """Return that of each token of the prompt but the first, too; the whole prompt is computed then."""
    distribution: bool = False
    """Return the log-probability of every token of the vocabulary after the prompt; needs max_tokens 1."""


@dataclass(frozen=True)
class Generation:
    """One request to the engine. `request_id` is unique among running requests."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    program: Program = field(default_factory=Program)
    live: bool = False
    """Its program may be updated while it runs; its KV blocks are shared with nobody."""
    forced: int = 0
    """So many tokens at the prompt's end count as generated, to the program and in what comes out."""
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    """W3C trace context, for vLLM's own spans."""


class ActivationRows(NamedTuple):
    """Sparse activations of one read-out; row i is `positions[i]`, which ascend.

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

    def split(self, position: int) -> tuple["ActivationRows", "ActivationRows"]:
        """The rows before that position, and the others."""
        row = int(self.positions.searchsorted(position))
        entry = int(self.row_splits[row])
        active = (None, None) if self.active is None else (self.active[:row], self.active[row:])
        before = self._replace(
            positions=self.positions[:row],
            row_splits=self.row_splits[: row + 1],
            features=self.features[:entry],
            values=self.values[:entry],
            active=active[0],
        )
        after = self._replace(
            positions=self.positions[row:],
            row_splits=self.row_splits[row:] - self.row_splits[row],
            features=self.features[entry:],
            values=self.values[entry:],
            active=active[1],
        )
        return before, after


@dataclass(frozen=True)
class RevisionApplied:
    """From generated token `first_index` on, tokens are sampled under program `revision`."""

    revision: int
    first_index: int
    first_row: int
    """The position of the first row that was computed under it."""


class EditReport(NamedTuple):
    """Proof of what one edit did, measured inside the model's forward pass."""

    revision: int
    edit: int
    """Index into that revision's edits."""
    tokens_in_scope: int
    """Rows on which the edit was evaluated."""
    tokens_changed: int
    """Rows on which it changed the feature's activation."""
    mean_relative_size: float
    """|delta| / |x| of this edit alone, mean over the rows in scope; what was added to x, so where the program's
    limit scaled the sum of the edits down, this edit's share of it is scaled, too."""
    max_relative_size: float


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    FEATURE = "feature"
    """A feature was active on which it was to stop; the engine knows nothing of it."""


@dataclass(frozen=True)
class Finish:
    """The end of a generation."""

    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    """Prompt tokens taken from the prefix cache instead of being computed."""
    reports: tuple[EditReport, ...]
    limited_tokens: int = 0
    """Tokens that the edits would have moved past `Program.max_relative_size`, summed over sites and revisions: all were
    scaled down to it (clamp) or moved all the same (warn). Tokens from the prefix cache are not counted anew."""
    stopped_by: int | None = None
    """Which of the features it was to stop at, with FinishReason.FEATURE."""


class StepOutput(NamedTuple):
    """What one or more engine steps added. Nothing is sent twice."""

    first_index: int
    """Index of `token_ids[0]` among the generated tokens, from 0."""
    token_ids: tuple[int, ...]
    text: str
    """Added text; it may lag the tokens until a character is complete."""
    logprobs: tuple[float, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    """If asked for: in the first output, of each token of the prompt but the first."""
    distribution: NDArray[np.float32] | None = None
    """If asked for: log-probabilities by token, [vocab_size]."""
    activations: tuple[ActivationRows, ...] = ()
    applied: tuple[RevisionApplied, ...] = ()
    cached_tokens: int = 0
    """As in `Finish`."""
    encode_seconds: Mapping[str, float] = MappingProxyType({})
    """Time the worker spent encoding for the read-outs of the whole batch, by dictionary; of the requests of a step one
    is told."""
    finish: Finish | None = None


class Tokenizer(Protocol):
    """The model's tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Every id of the model is below it."""
        ...

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        ...

    @property
    def max_token_length(self) -> int:
        """Characters; no token of the vocabulary has more."""
        ...

    async def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer adds by itself, or without."""
        ...

    async def chat(self, messages: Sequence[Mapping[str, str]], continue_last: bool) -> list[int]:
        """Messages (role, content) by the model's chat template; InvalidRequest if it refuses them.

        The model is to begin a message of its own, or to go on with the last one.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text that these generated tokens print."""
        ...

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
    workers: int
    """Processes that have the dictionaries in memory."""
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

    def so_far(self, request_id: str) -> tuple[tuple[EditReport, ...], int]:
        """`reports` and `limited_tokens` that a running generation's `Finish` would have if its outputs ended here."""
        ...

    def generate(self, generation: Generation) -> AsyncIterator[StepOutput]:
        """The outputs in order; the last has `finish`. Closing the iterator aborts the generation.

        Waits while the features it edits find no free slot. EditNotApplied when an edit provably did not run.
        """
        ...

    async def update(self, request_id: str, program: Program, at_index: int | None = None) -> int:
        """Replaces the program of a live generation and returns the new revision, counted from 1.

        It holds from the next step on, or from the generated token `at_index` on, the first one drawn under it, if that
        has not been drawn yet. An update that takes hold while an earlier one still waits for its index replaces it.
        The change is acknowledged by `StepOutput.applied`, or not at all if the generation ends first; InvalidRequest if
        it is not live or has ended.
        """
        ...

    async def pause(self, request_id: str) -> None:
        """Stops computing tokens of a live generation until `resume`; those of steps under way still come.

        It gives its KV blocks back and keeps its feature slots; updates wait for it. What follows is the same as without
        the pause. Pausing twice is pausing once; InvalidRequest if it is not live or has ended.
        """
        ...

    async def resume(self, request_id: str) -> None:
        """Lets a paused generation go on, and another one be; InvalidRequest as for `pause`."""
        ...

    async def shutdown(self) -> None: ...
