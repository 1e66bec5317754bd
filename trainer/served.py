"""The model as vLLM serves it: sites are read with the read-outs that clients use, so nothing lies between a
dictionary's training and its service.

At each site the engine holds the identity as a dictionary of plain directions: a token's activations are the coordinates
of x, bit by bit, and a read-out of all that are not 0 is x. They are taken before edits, of every prompt token, whether
the prefix cache has it or not.
"""

import asyncio
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer_server.admission import MAX_READ_OUTS, MAX_ROW_BYTES
from steer_server.dictionary.card import Card, Model, config_digest
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.features import FeatureStatistics
from steer_server.dictionary.files import StoredDictionary, load, save
from steer_server.dictionary.site import SERVED, Site
from steer_server.errors import EngineUnavailable
from steer_server.generation import ActivationRows, Engine, Generation, Sampling
from steer_server.program import ENTRY_BYTES, Program, ReadOut
from trainer.config import TrainConfig
from trainer.errors import BadConfig, TrainerError
from trainer.model import Read, shape_of
from trainer.stop import Stop

WIDEST = MAX_ROW_BYTES // ENTRY_BYTES
"""Coordinates that one read-out can carry."""


class Coordinates(NamedTuple):
    """The coordinates [first, last) of x at a site, resident in the engine as a dictionary of that name."""

    site: Site
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"x.{self.site}.{self.first}"

    @property
    def read_out(self) -> ReadOut:
        """All that are not 0."""
        return ReadOut(self.name, above=0.0, row_bytes=ENTRY_BYTES * (self.last - self.first))


class ServedModel:
    """Reads sites of a running engine, which holds `coordinates` of them."""

    def __init__(self, engine: Engine, coordinates: Sequence[Coordinates]) -> None:
        self._engine = engine
        self._coordinates = list(coordinates)

    async def read_sites(self, sites: Sequence[Site], contexts: Tensor) -> list[Tensor]:
        """As `trainer.model.read_sites`, on the host in float32."""
        wanted = [part for part in self._coordinates if part.site in sites]
        width = max(part.last for part in wanted)
        found = {site: np.zeros((*contexts.shape, width), np.float32) for site in sites}
        # A request takes so many read-outs; for more the model runs again.
        for start in range(0, len(wanted), MAX_READ_OUTS):
            parts = wanted[start : start + MAX_READ_OUTS]
            rows = [[found[part.site][i] for part in parts] for i in range(len(contexts))]
            await asyncio.gather(
                *(
                    self._read(parts, tokens, tables)
                    for tokens, tables in zip(contexts.tolist(), rows, strict=True)
                )
            )
        return [torch.from_numpy(found[site]) for site in sites]

    async def _read(
        self, parts: Sequence[Coordinates], tokens: list[int], tables: Sequence[NDArray[np.float32]]
    ) -> None:
        """Fills the tables, positions x d_model, one for each part."""
        program = Program((), tuple(part.read_out for part in parts))
        sampling = Sampling(max_tokens=1, temperature=0.0)
        generation = Generation(f"read-{uuid.uuid4().hex}", tuple(tokens), sampling, program)
        missing = len(parts) * len(tokens)
        async for step in self._engine.generate(generation):
            for rows in step.activations:
                _fill(tables[rows.read_out], parts[rows.read_out], rows)
                missing -= len(rows.positions)
        if missing:
            raise EngineUnavailable(
                f"vLLM ended a request with {missing} of its rows unread; its log says why"
            )


@contextmanager
def served(
    config: TrainConfig,
    sites: Sequence[Site],
    stop: Stop,
    max_num_batched_tokens: int | None = None,
) -> Iterator[Read]:
    """While entered, vLLM runs with the model, prepared to read the sites; BadConfig if it cannot.

    `max_num_batched_tokens` is vLLM's: longer contexts are computed in chunks.
    """
    _check(config, sites)
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        with _quiet():
            engine = runner.run(_start(config, sites, max_num_batched_tokens))
        try:
            model = ServedModel(engine, runner.run(_load(engine, config, sites, Path(folder))))

            def read(sites: Sequence[Site], contexts: Tensor) -> list[Tensor]:
                try:
                    return runner.run(model.read_sites(sites, contexts))
                except EngineUnavailable:
                    # What stops us may have been sent to vLLM's processes, too.
                    stop.check("vLLM was stopped, too")
                    raise

            yield read
        finally:
            runner.run(engine.shutdown())


@contextmanager
def _quiet() -> Iterator[None]:
    """vLLM, and the processes it starts, say little, and leave standard output to results, unless told otherwise."""
    wanted = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


async def _start(
    config: TrainConfig, sites: Sequence[Site], max_num_batched_tokens: int | None
) -> Engine:
    try:
        # Late: the trainer does without vLLM unless it is asked for.
        from steer_server.engine import EngineSettings, VllmEngine
    except ImportError as error:
        raise BadConfig(
            'source = "vllm" needs vLLM beside the trainer: pip install "steer[trainer,server-cpu]", or server-cuda '
            f'on a GPU; source = "transformers" does without ({error})'
        ) from error
    settings = EngineSettings(
        config.model,
        tuple(sites),
        # The token that ends a request has a place of its own.
        max_model_len=config.context + 1,
        # vLLM wants no more of these than tokens in a batch.
        max_num_seqs=min(64, max_num_batched_tokens or 64),
        max_num_batched_tokens=max_num_batched_tokens,
        dtype=config.served_dtype,
        enforce_eager=True,
        # Contexts end after a token, so few are in it; vLLM takes all of it at once.
        kv_cache_gib=1,
    )
    # A terminal's Ctrl-C goes to every process of ours. vLLM's inherit that it waits, and so live until they are shut down.
    # Python's tracker of shared memory, which starts with the first process, would let it through again.
    resource_tracker.ensure_running()
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return await VllmEngine.start(settings)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


async def _load(
    engine: Engine, config: TrainConfig, sites: Sequence[Site], folder: Path
) -> list[Coordinates]:
    """Makes the coordinates of every site resident."""
    shape = shape_of(config.model)
    d_model = shape["hidden_size"]
    parts = [
        Coordinates(site, first, min(first + WIDEST, d_model))
        for site in sites
        for first in range(0, d_model, WIDEST)
    ]
    for part in parts:
        stored = _identity(part, d_model, Model(config.model, "", config_digest(shape)), folder)
        await engine.add_dictionary(part.name, stored)
    return parts


def _identity(part: Coordinates, d_model: int, model: Model, folder: Path) -> StoredDictionary:
    dictionary = Dictionary.directions(torch.eye(d_model)[part.first : part.last])
    card = Card.of(
        dictionary,
        name=part.name,
        model=model,
        site=part.site,
        architecture="directions",
        dtype="float16",
    )
    save(folder / part.name, card, dictionary, FeatureStatistics.zeros(dictionary.n_features))
    return load(folder / part.name)


def _fill(table: NDArray[np.float32], part: Coordinates, rows: ActivationRows) -> None:
    assert rows.active is not None
    listed = np.diff(rows.row_splits)
    if not np.array_equal(listed, rows.active):
        # A comparison with what is no number is false, so it is counted and not listed.
        raise TrainerError(f"an activation at {part.site} is not finite; try another served_dtype")
    table[np.repeat(rows.positions, listed), part.first + rows.features] = rows.values


def _check(config: TrainConfig, sites: Sequence[Site]) -> None:
    layers = shape_of(config.model)["num_hidden_layers"]
    for site in sites:
        if site.stream not in SERVED:
            raise BadConfig(
                f'site {site} is not served by vLLM, so source = "vllm" cannot read it; it reads {", ".join(SERVED)}; '
                'set source = "transformers"'
            )
        if site.layer >= layers:
            raise BadConfig(f"site {site} does not exist: the model has layers 0..{layers - 1}")
