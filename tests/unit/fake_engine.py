"""An engine without a model: its x is made up, what dictionaries make of x is real."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from steer_server.admission import check_revisions, check_scopes
from steer_server.dictionary.edits import edit_delta
from steer_server.dictionary.files import StoredDictionary
from steer_server.errors import EditTooLarge, InvalidRequest
from steer_server.generation import (
    ActivationRows,
    EditReport,
    Finish,
    FinishReason,
    Generation,
    RevisionApplied,
    SlotLoad,
    StepOutput,
    Tokenizer,
)
from steer_server.program import Oversize, Program, ReadOut

VOCAB = 128


class CharTokenizer:
    """One token per ASCII character."""

    vocab_size = VOCAB
    chats = True
    max_token_length = 1

    async def encode(self, text: str, special: bool = True) -> list[int]:
        return [ord(character) % VOCAB for character in text]

    async def chat(self, messages: Sequence[Mapping[str, str]], continue_last: bool) -> list[int]:
        if messages[0]["role"] == "tool":
            raise InvalidRequest("the model's chat template refuses it: a tool speaks first")
        lines = [f"{message['role'][0]}:{message['content']}" for message in messages]
        return await self.encode("\n".join(lines) + ("" if continue_last else "\na:"))

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(self.pieces(token_ids))

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        return [chr(token) for token in token_ids]


@dataclass
class _Running:
    generation: Generation
    programs: list[Program]
    at: list[int]
    """By revision: the first generated token that it may hold at."""
    revision: int = 0
    """The one that holds; later programs wait for their token."""
    going: asyncio.Event = field(default_factory=asyncio.Event)
    """Not set while it is paused."""
    limited: int = 0
    """Tokens past the limit."""
    tokens: list[int] = field(default_factory=list)
    counts: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    """By revision and edit: tokens in scope, changed, sum and largest of relative sizes."""

    @property
    def prompt_length(self) -> int:
        return len(self.generation.prompt_token_ids) - self.generation.forced


class FakeEngine:
    """Generates greedily, one token per step, from a fixed random map of the edited x."""

    model_id = "fake"

    def __init__(self, d_model: int, max_model_len: int = 64) -> None:
        generator = torch.Generator().manual_seed(7)
        self.max_model_len = max_model_len
        self.max_num_seqs = 8
        self.workers = 1
        self.d_model = d_model
        self.self_test_passed = False
        self.tokenizer: Tokenizer = CharTokenizer()
        self.alive = True
        self.slot_load = SlotLoad({"resid_post.1": 0}, 16, 0)
        self.cached_tokens = 0
        """Prompt tokens that the pretended prefix cache holds."""
        self.merge = 1
        """Steps per output, as if the reader were slow."""
        self.ends_after = 0
        """If set, a generation ends with this token, as if it said so."""
        self.failure: Exception | None = None
        """Raised in place of the second output."""
        self.steps: asyncio.Semaphore | None = None
        """If set, each step takes one."""
        self.replies: asyncio.Semaphore | None = None
        """If set, each update takes one before it returns, although it holds."""
        self.running: dict[str, _Running] = {}
        self.finished: list[str] = []
        self.aborted: list[str] = []
        self.computed: list[tuple[str, Tensor]] = []
        """Every x that was computed, in order."""
        self._dictionaries: dict[str, StoredDictionary] = {}
        self._embedding = torch.randn(VOCAB, d_model, generator=generator) * 3
        self._head = torch.randn(d_model, VOCAB, generator=generator)

    async def add_dictionary(self, name: str, stored: StoredDictionary) -> None:
        self._dictionaries[name] = stored

    async def remove_dictionary(self, name: str) -> None:
        del self._dictionaries[name]

    async def self_test(self) -> None:
        self.self_test_passed = True

    async def shutdown(self) -> None:
        self.alive = False

    async def update(self, request_id: str, program: Program, at_index: int | None = None) -> int:
        state = self._live(request_id)
        if at_index is not None and at_index < 0:
            raise InvalidRequest(f"{at_index} is no index of a token", field="at_index")
        programs = [*state.programs, program]
        check_revisions(programs, self._dictionaries, self.slot_load.capacity)
        state.programs.append(program)
        state.at.append(at_index or 0)
        revision = len(state.programs) - 1
        if self.replies:
            await self.replies.acquire()
        return revision

    def so_far(self, request_id: str) -> tuple[tuple[EditReport, ...], int]:
        state = self.running[request_id]
        return _reports(state), state.limited

    async def pause(self, request_id: str) -> None:
        self._live(request_id).going.clear()

    async def resume(self, request_id: str) -> None:
        self._live(request_id).going.set()

    def _live(self, request_id: str) -> _Running:
        state = self.running.get(request_id)
        if state is None or not state.generation.live:
            raise InvalidRequest(f"generation {request_id} is not live or has ended")
        return state

    async def generate(self, generation: Generation) -> AsyncGenerator[StepOutput, None]:
        state = _Running(generation, [generation.program], [0])
        computed = generation.forced + generation.sampling.max_tokens
        check_scopes(generation.program, state.prompt_length, computed)
        state.going.set()
        self.running[generation.request_id] = state
        try:
            while True:
                outputs = [await self._step(state)]
                while len(outputs) < self.merge and not outputs[-1].finish:
                    outputs.append(await self._step(state))
                yield _merged(outputs)
                if outputs[-1].finish:
                    self.finished.append(generation.request_id)
                    return
                if self.failure:
                    raise self.failure
        finally:
            del self.running[generation.request_id]
            if generation.request_id not in self.finished:
                self.aborted.append(generation.request_id)

    async def _step(self, state: _Running) -> StepOutput:
        if self.steps:
            await self.steps.acquire()
        else:
            await asyncio.sleep(0)
        await state.going.wait()
        prompt, sampling = state.generation.prompt_token_ids, state.generation.sampling
        index = len(state.tokens)
        due = max(revision for revision, at in enumerate(state.at) if at <= index)
        positions = range(len(prompt)) if index == 0 else [len(prompt) + index - 1]
        begun = range(state.revision + 1, due + 1)
        applied = tuple(RevisionApplied(revision, index, positions[0]) for revision in begun)
        state.revision = due
        x = self._embedding[list(prompt) if index == 0 else [state.tokens[-1]]]
        self.computed.append((state.generation.request_id, x))
        edited = self._edited(state, x, positions)
        logprobs = (edited @ self._head).log_softmax(1)
        state.tokens.append(int(logprobs[-1].argmax()))
        forced = logprobs[:-1].gather(1, torch.tensor(prompt)[1:, None]) if index == 0 else None
        done = len(state.tokens) in (sampling.max_tokens, self.ends_after)
        return StepOutput(
            index,
            (state.tokens[-1],),
            chr(state.tokens[-1]),
            (float(logprobs[-1].max()),) if sampling.logprobs else (),
            tuple(forced[:, 0].tolist()) if sampling.prompt_logprobs and index == 0 else (),
            logprobs[-1].numpy() if sampling.distribution else None,
            tuple(self._rows(state, x, edited, positions)),
            applied,
            self.cached_tokens,
            dict.fromkeys(self._dictionaries, 0.001),
            self._finish(state) if done else None,
        )

    def _edited(self, state: _Running, x: Tensor, positions: Sequence[int]) -> Tensor:
        program = state.programs[state.revision]
        prompt = state.generation.prompt_token_ids
        tokens = (*prompt, *state.tokens)
        deltas = torch.zeros(len(program.edits), *x.shape)
        for index, entry in enumerate(program.edits):
            dictionary = self._dictionaries[entry.dictionary].dictionary
            delta = edit_delta(dictionary, x, [entry.edit], positions)
            holds = torch.ones(len(x), dtype=torch.bool)
            if entry.when:
                holds = dictionary.encode(x)[:, entry.when.feature] > entry.when.above
            for row, position in enumerate(positions):
                if entry.where.holds(position, state.prompt_length, tokens[position]):
                    deltas[index, row] = delta[row] * holds[row]
        deltas *= _scale(state, program, x, deltas.sum(dim=0))
        for index, entry in enumerate(program.edits):
            count = state.counts.setdefault((state.revision, index), [0, 0, 0.0, 0.0])
            for row, position in enumerate(positions):
                if entry.where.holds(position, state.prompt_length, tokens[position]):
                    size = float(deltas[index, row].norm() / x[row].norm())
                    count[0] += 1
                    count[1] += bool(deltas[index, row].any())
                    count[2] += size
                    count[3] = max(count[3], size)
        return x + deltas.sum(dim=0)

    def _rows(self, state: _Running, x: Tensor, edited: Tensor, positions: Sequence[int]):
        prompt_length = state.prompt_length
        for index, read_out in enumerate(state.programs[state.revision].read_outs):
            wanted = [
                row
                for row, position in enumerate(positions)
                if (read_out.prompt if position < prompt_length else read_out.generated)
                and (read_out.complete or position >= self.cached_tokens)
            ]
            if wanted:
                read = (edited if read_out.edited else x)[wanted]
                f = self._dictionaries[read_out.dictionary].dictionary.encode(read)
                yield _sparse(index, read_out, [positions[row] for row in wanted], f)

    def _finish(self, state: _Running) -> Finish:
        return Finish(
            FinishReason.LENGTH,
            state.prompt_length,
            len(state.tokens),
            self.cached_tokens,
            _reports(state),
            state.limited,
        )


def _reports(state: _Running) -> tuple[EditReport, ...]:
    return tuple(
        EditReport(revision, edit, int(scope), int(changed), total / max(scope, 1), largest)
        for (revision, edit), (scope, changed, total, largest) in sorted(state.counts.items())
    )


def _scale(state: _Running, program: Program, x: Tensor, delta: Tensor) -> Tensor:
    """The part of each row's delta that its limit leaves, [rows, 1]; EditTooLarge if it leaves none."""
    if program.max_relative_size is None:
        return torch.ones(len(x), 1)
    most, size = program.max_relative_size * x.norm(dim=1), delta.norm(dim=1)
    over = size > most
    if over.any() and program.oversize is Oversize.REJECT:
        raise EditTooLarge(f"the edits are past the limit of {program.max_relative_size:g}")
    state.limited += int(over.sum())
    clamped = over & (program.oversize is Oversize.CLAMP)
    return torch.where(clamped, most / size, 1.0)[:, None]


def _sparse(index: int, read_out: ReadOut, positions: list[int], f: Tensor) -> ActivationRows:
    features, values, splits = [], [], [0]
    for row in f:
        order = read_out.features or row.argsort(descending=True).tolist()[: read_out.limit]
        least = read_out.above or 0.0
        active = [feature for feature in order if row[feature] > least]
        features += active
        values += row[active].tolist()
        splits.append(len(features))
    return ActivationRows(
        index,
        read_out.dictionary,
        np.array(positions, np.uint32),
        np.array(splits, np.uint32),
        np.array(features, np.uint32),
        np.array(values, np.float32),
        (f != 0).sum(dim=1).numpy().astype(np.uint32) if not read_out.features else None,
    )


def _merged(outputs: list[StepOutput]) -> StepOutput:
    return StepOutput(
        outputs[0].first_index,
        sum((output.token_ids for output in outputs), ()),
        "".join(output.text for output in outputs),
        sum((output.logprobs for output in outputs), ()),
        outputs[0].prompt_logprobs,
        outputs[0].distribution,
        sum((output.activations for output in outputs), ()),
        sum((output.applied for output in outputs), ()),
        outputs[-1].cached_tokens,
        outputs[-1].encode_seconds,
        outputs[-1].finish,
    )
