"""The model's activations at its sites, on disk once, for as many dictionaries as one likes."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from steer_server.dictionary.site import Site
from trainer.config import TrainConfig
from trainer.errors import BadCheckpoint, BadConfig, TrainerError
from trainer.files import whole_file, write_json
from trainer.model import Read, load_model, load_tokenizer, read_sites, truncate
from trainer.ranks import ALONE, Ranks
from trainer.served import served
from trainer.source import BySite, Rows, random_order
from trainer.stop import Stop
from trainer.tokens import pack

SHARD_CONTEXTS = 64
FORWARD_CONTEXTS = 8
_PIECE_CONTEXTS = 8
_SCALE_SHARDS = 16
TOKENS, META = "tokens.safetensors", "activations.json"


@dataclass(frozen=True, eq=False)
class Activations:
    """What a harvest left of a site: memory-mapped shards of activations, and the contexts they come from. A `Source`."""

    shards: list[Tensor]
    """rows x d_model each."""
    rows: list[Tensor]
    """Of each shard, the place of every row: context x context length + position."""
    train: Tensor
    """Training contexts, contexts x positions, int32."""
    heldout: Tensor
    max_norm: float
    """Activations longer than this were left out."""
    site: Site

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    @property
    def widths(self) -> dict[Site, int]:
        return {self.site: self.d_model}

    @property
    def max_norms(self) -> dict[Site, float]:
        return {self.site: self.max_norm}

    @property
    def count(self) -> int:
        return sum(len(shard) for shard in self.shards)

    @property
    def d_model(self) -> int:
        return self.shards[0].shape[1]

    def gather(self, index: Tensor) -> Tensor:
        """The rows of that number, counted through all shards, in float32."""
        x = torch.empty(len(index), self.d_model)
        first = 0
        order = index.argsort()
        bounds = torch.tensor([0, *(len(shard) for shard in self.shards)]).cumsum(0)
        cuts = torch.searchsorted(index[order], bounds).tolist()
        for shard, low, high in zip(self.shards, cuts, cuts[1:], strict=False):
            here = order[low:high]
            x[here] = shard[index[here] - first].float()
            first += len(shard)
        return x

    def scale_and_mean(self, normalise: bool) -> dict[Site, tuple[float, Tensor]]:
        stride = -(-len(self.shards) // _SCALE_SHARDS)
        chosen = self.shards[::stride]
        rows = sum(len(shard) for shard in chosen)
        squares = sum(shard.double().square().sum().item() for shard in chosen)
        mean = torch.stack([shard.double().sum(dim=0) for shard in chosen]).sum(dim=0) / rows
        scale = math.sqrt(self.d_model * rows / squares) if normalise else 1.0
        return {self.site: (scale, mean.float())}

    def batches(self, config: TrainConfig, step: int, ranks: Ranks = ALONE) -> Iterator[BySite]:
        epoch, place = divmod(step, self.count // config.batch)
        while True:
            order = torch.randperm(self.count, generator=random_order(config, epoch))
            for index in order.split(config.batch)[place : self.count // config.batch]:
                yield {self.site: self.gather(ranks.own_tokens(index))}
            epoch, place = epoch + 1, 0

    def pieces(self) -> Iterator[Rows]:
        length = self.train.shape[1]
        for x, rows in zip(self.shards, self.rows, strict=True):
            contexts = rows.long() // length
            piece = (contexts - contexts[0]) // _PIECE_CONTEXTS
            sizes = torch.bincount(piece).tolist()
            for some, places in zip(x.split(sizes), rows.split(sizes), strict=True):
                yield {self.site: (some, places.long())}

    def contexts(self, numbers: list[int]) -> Iterator[Rows]:
        length = self.train.shape[1]
        for number in numbers:
            shard = number // SHARD_CONTEXTS
            places = self.rows[shard].long()
            here = places // length == number
            yield {self.site: (self.shards[shard][here], places[here])}

    def close(self) -> None:
        """The system takes back mapped memory by itself."""


Found = Mapping[Site, tuple[Tensor, Tensor]]
"""At each site x of a group of contexts, [rows, width] as it is stored, and which rows are kept, on the device."""


class Reader:
    """Runs the model on groups of training contexts, whose contexts always go through it together."""

    def __init__(
        self, config: TrainConfig, sites: Sequence[Site], folder: Path, stop: Stop
    ) -> None:
        """The contexts and the norms' bounds are those of a harvest in `folder`."""
        self.sites = tuple(sites)
        self.tokens = _tokens(config, folder, stop, ALONE)
        self.size = FORWARD_CONTEXTS
        self.groups = -(-len(self.tokens["train"]) // self.size)
        self._config = config
        self._model: nn.Module | None = None
        if any(not (folder / str(site) / META).exists() for site in sites):
            read = partial(read_sites, self._loaded())
            _find_max_norms(config, folder, read, sites, self.tokens["train"])
        self.max_norms = {site: _max_norm(folder, site) for site in sites}

    def read(self, group: int) -> Found:
        """Of all positions but the first ones that are left out."""
        contexts = self.tokens["train"][group * self.size :][: self.size]
        skip = self._config.skip_positions
        found: dict[Site, tuple[Tensor, Tensor]] = {}
        for site, x in zip(
            self.sites, read_sites(self._loaded(), self.sites, contexts), strict=True
        ):
            keep = kept(self._config, x, self.max_norms[site])[:, skip:].flatten()
            # What is left out may be too long for the stored dtype.
            x = x[:, skip:].flatten(0, 1).masked_fill(~keep[:, None], 0.0)
            found[site] = _stored(self._config, site, x), keep
        return found

    def close(self) -> None:
        """Gives the model's memory back; it is loaded again when it is needed."""
        self._model = None

    def _loaded(self) -> nn.Module:
        if self._model is None:
            model = load_model(self._config.model, self._config.weights, self._config.data_seed)
            self._model = truncate(model, self.sites)
        return self._model


def harvest(
    config: TrainConfig,
    sites: Sequence[Site],
    folder: Path,
    stop: Stop,
    on_end: Callable[[int, float], None] = lambda tokens, seconds: None,
    ranks: Ranks = ALONE,
) -> dict[Site, Activations]:
    """The activations in `folder` of each site, harvested as far as they are not there yet.

    The model runs once for all sites that lack the same shards. Each shard is written whole; a stop loses at most the
    shard in progress. `on_end` is told how many tokens the model read, and in how many seconds, if it did.
    Rank r of n takes the shards r, r + n, r + 2 n, ...
    """
    tokens = _tokens(config, folder, stop, ranks)
    contexts = tokens["train"]
    shards = contexts.split(SHARD_CONTEXTS)
    lacking = {
        number: [site for site in sites if not _shard(folder, site, number).exists()]
        for number in range(ranks.rank, len(shards), ranks.size)
    }
    if any(lacking.values()):
        if ranks.size > 1 and config.source == "vllm":
            raise BadConfig(
                "one process harvests from vLLM: run `python -m trainer harvest` before torchrun"
            )
        done = sum(len(shards[number]) for number, those in lacking.items() if not those)
        with (
            reader(config, sites, stop) as read,
            tqdm(
                desc=f"harvest {', '.join(map(str, sites))}",
                total=sum(shards[number].numel() for number in lacking),
                initial=done * config.context,
                unit=" tokens",
            ) as bar,
        ):
            begun = time.monotonic()
            if ranks.first:
                _find_max_norms(config, folder, read, sites, contexts)
            ranks.wait_for(
                [folder / str(site) / META for site in sites], stop, "the harvest starts anew"
            )
            for number, those in lacking.items():
                if those:
                    _write_shards(config, folder, read, those, number, shards[number], bar, stop)
            tokens_read = sum(shards[number].numel() for number, those in lacking.items() if those)
            on_end(tokens_read, time.monotonic() - begun)
    written = (_shard(folder, site, number) for site in sites for number in range(len(shards)))
    ranks.wait_for(written, stop, "the harvest has every shard of this process")
    return {
        site: _open(
            [_shard(folder, site, number) for number in range(len(shards))],
            tokens,
            _max_norm(folder, site),
            site,
        )
        for site in sites
    }


@contextmanager
def reader(config: TrainConfig, sites: Sequence[Site], stop: Stop) -> Iterator[Read]:
    """While entered, what reads the sites: the model in this process, or the serving engine."""
    if config.source == "vllm":
        with served(config, sites, stop) as read:
            stop.check("vLLM had started, and nothing else is new")
            yield read
    else:
        model = load_model(config.model, config.weights, config.data_seed)
        yield partial(read_sites, truncate(model, sites))


def longest_kept(config: TrainConfig, x: Tensor) -> float:
    """`max_norm_ratio` medians of |x|, contexts x positions x width, or what no float32 exceeds."""
    median = x[:, config.skip_positions :].float().norm(dim=-1).median().item()
    return median * config.max_norm_ratio or torch.finfo(torch.float32).max


def kept(config: TrainConfig, x: Tensor, max_norm: float) -> Tensor:
    """Which activations a dictionary is about, contexts x positions; attention sinks are not."""
    keep = x.float().norm(dim=-1) <= max_norm
    keep[:, : config.skip_positions] = False
    return keep


def _tokens(config: TrainConfig, folder: Path, stop: Stop, ranks: Ranks) -> dict[str, Tensor]:
    path = folder / TOKENS
    if ranks.first and not path.exists():
        packed = pack(config, load_tokenizer(config.model), stop)
        with whole_file(path) as fresh:
            save_file(packed, fresh)
    ranks.wait_for([path], stop, "tokenising starts anew")
    return load_file(path)


def _shard(folder: Path, site: Site, number: int) -> Path:
    return folder / str(site) / f"shard-{number:05d}.safetensors"


def _max_norm(folder: Path, site: Site) -> float:
    return json.loads((folder / str(site) / META).read_text(encoding="utf-8"))["max_norm"]


def _find_max_norms(
    config: TrainConfig, folder: Path, read: Read, sites: Sequence[Site], contexts: Tensor
) -> None:
    """As `longest_kept` over the first contexts, found once per site."""
    new = [site for site in sites if not (folder / str(site) / META).exists()]
    if not new:
        return
    found = read(new, contexts[:FORWARD_CONTEXTS])
    for site, x in zip(new, found, strict=True):
        content = {"max_norm": longest_kept(config, x), "site": str(site)}
        write_json(folder / str(site) / META, content | {"model": config.model})


def _write_shards(
    config: TrainConfig,
    folder: Path,
    read: Read,
    sites: Sequence[Site],
    number: int,
    contexts: Tensor,
    bar: tqdm,
    stop: Stop,
) -> None:
    """The shard of that number, of each of the sites."""
    paths = {site: _shard(folder, site, number) for site in sites}
    kinds: dict[Site, tuple[list[Tensor], list[Tensor]]] = {site: ([], []) for site in sites}
    bounds = {site: _max_norm(folder, site) for site in sites}
    start = number * SHARD_CONTEXTS * config.context
    for batch in contexts.split(FORWARD_CONTEXTS):
        for site, x in zip(sites, read(sites, batch), strict=True):
            keep = kept(config, x, bounds[site])
            values, rows = kinds[site]
            values.append(_stored(config, site, x[keep]).cpu())
            rows.append(keep.flatten().nonzero().squeeze(1).cpu() + start)
        start += batch.numel()
        bar.update(batch.numel())
        stop.check(f"the harvest has every shard before {paths[sites[0]].name}")
    for site, (values, rows) in kinds.items():
        with whole_file(paths[site]) as fresh:
            save_file({"x": torch.cat(values), "row": torch.cat(rows).to(torch.int32)}, fresh)


def _stored(config: TrainConfig, site: Site, x: Tensor) -> Tensor:
    stored = x.to(getattr(torch, config.activation_dtype))
    if not stored.isfinite().all():
        raise TrainerError(
            f"an activation of {x.abs().max().item():.3g} at {site} overflows "
            f"{config.activation_dtype}; set activation_dtype to bfloat16 or float32"
        )
    return stored


def _open(paths: list[Path], tokens: dict[str, Tensor], max_norm: float, site: Site) -> Activations:
    shards: list[Tensor] = []
    rows: list[Tensor] = []
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                shards.append(file.get_tensor("x"))
                rows.append(file.get_tensor("row"))
        except Exception as error:
            raise BadCheckpoint(f"{path} is damaged ({error}); remove it and run again") from error
    return Activations(shards, rows, tokens["train"], tokens["heldout"], max_norm, site)
