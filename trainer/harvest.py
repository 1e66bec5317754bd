"""The model's activations at its sites, on disk once, for as many dictionaries as one likes."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from steer_server.dictionary.site import Site
from trainer.config import TrainConfig
from trainer.errors import BadCheckpoint, TrainerError
from trainer.files import whole_file, write_json
from trainer.model import Read, load_model, load_tokenizer, read_sites, truncate
from trainer.served import served
from trainer.stop import Stop
from trainer.tokens import pack

SHARD_CONTEXTS = 64
FORWARD_CONTEXTS = 8
TOKENS, META = "tokens.safetensors", "activations.json"


@dataclass(frozen=True, eq=False)
class Activations:
    """What a harvest left: memory-mapped shards of activations, and the contexts they come from."""

    shards: list[Tensor]
    """rows x d_model each."""
    rows: list[Tensor]
    """Of each shard, the place of every row: context x context length + position."""
    train: Tensor
    """Training contexts, contexts x positions, int32."""
    heldout: Tensor
    max_norm: float
    """Activations longer than this were left out."""

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


def harvest(
    config: TrainConfig, sites: Sequence[Site], folder: Path, stop: Stop
) -> dict[Site, Activations]:
    """The activations in `folder` of each site, harvested as far as they are not there yet.

    The model runs once for all sites that lack the same shards. Each shard is written whole; a stop loses at most the
    shard in progress.
    """
    tokens = _tokens(config, folder, stop)
    contexts = tokens["train"]
    shards = contexts.split(SHARD_CONTEXTS)
    lacking = {
        number: [site for site in sites if not _shard(folder, site, number).exists()]
        for number in range(len(shards))
    }
    if any(lacking.values()):
        done = sum(len(shards[number]) for number, those in lacking.items() if not those)
        with (
            reader(config, sites, stop) as read,
            tqdm(
                desc=f"harvest {', '.join(map(str, sites))}",
                total=contexts.numel(),
                initial=done * config.context,
                unit=" tokens",
            ) as bar,
        ):
            _find_max_norms(config, folder, read, sites, contexts)
            for number, those in lacking.items():
                if those:
                    _write_shards(config, folder, read, those, number, shards[number], bar, stop)
    return {
        site: _open(
            [_shard(folder, site, number) for number in range(len(shards))],
            tokens,
            _max_norm(folder, site),
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
        yield partial(read_sites, truncate(load_model(config.model), sites))


def longest_kept(config: TrainConfig, x: Tensor) -> float:
    """`max_norm_ratio` medians of |x|, contexts x positions x d_model."""
    median = x[:, config.skip_positions :].float().norm(dim=-1).median().item()
    return median * config.max_norm_ratio


def kept(config: TrainConfig, x: Tensor, max_norm: float) -> Tensor:
    """Which activations a dictionary is about, contexts x positions; attention sinks are not."""
    keep = x.float().norm(dim=-1) <= max_norm
    keep[:, : config.skip_positions] = False
    return keep


def _tokens(config: TrainConfig, folder: Path, stop: Stop) -> dict[str, Tensor]:
    path = folder / TOKENS
    if not path.exists():
        packed = pack(config, load_tokenizer(config.model), stop)
        with whole_file(path) as fresh:
            save_file(packed, fresh)
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
            values.append(_stored(config, site, x[keep]))
            rows.append(keep.flatten().nonzero().squeeze(1).cpu() + start)
        start += batch.numel()
        bar.update(batch.numel())
        stop.check(f"the harvest has every shard before {paths[sites[0]].name}")
    for site, (values, rows) in kinds.items():
        with whole_file(paths[site]) as fresh:
            save_file({"x": torch.cat(values), "row": torch.cat(rows).to(torch.int32)}, fresh)


def _stored(config: TrainConfig, site: Site, x: Tensor) -> Tensor:
    stored = x.to(getattr(torch, config.activation_dtype)).cpu()
    if not stored.isfinite().all():
        raise TrainerError(
            f"an activation of {x.abs().max().item():.3g} at {site} overflows "
            f"{config.activation_dtype}; set activation_dtype to bfloat16 or float32"
        )
    return stored


def _open(paths: list[Path], tokens: dict[str, Tensor], max_norm: float) -> Activations:
    shards: list[Tensor] = []
    rows: list[Tensor] = []
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                shards.append(file.get_tensor("x"))
                rows.append(file.get_tensor("row"))
        except Exception as error:
            raise BadCheckpoint(f"{path} is damaged ({error}); remove it and run again") from error
    return Activations(shards, rows, tokens["train"], tokens["heldout"], max_norm)
