"""The model's activations at one site, on disk once, for as many dictionaries as one likes."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from steer_server.dictionary.site import Site
from trainer.config import TrainConfig
from trainer.errors import BadCheckpoint, TrainerError
from trainer.files import whole_file, write_json
from trainer.model import load_model, load_tokenizer, read_site, truncate
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


def harvest(config: TrainConfig, folder: Path, stop: Stop) -> Activations:
    """The activations in `folder`, harvested as far as they are not there yet.

    Each shard is written whole; a stop loses at most the shard in progress.
    """
    tokens = _tokens(config, folder, stop)
    contexts = tokens["train"]
    count = -(-len(contexts) // SHARD_CONTEXTS)
    paths = [folder / f"shard-{number:05d}.safetensors" for number in range(count)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        site = Site.parse(config.site)
        model = truncate(load_model(config.model), site)
        max_norm = _max_norm(config, folder, model, site, contexts)
        done = len(contexts) - sum(_length(contexts, paths.index(path)) for path in missing)
        with tqdm(
            desc=f"harvest {site}",
            total=contexts.numel(),
            initial=done * config.context,
            unit=" tokens",
        ) as bar:
            for path in missing:
                number = paths.index(path)
                here = contexts[number * SHARD_CONTEXTS :][:SHARD_CONTEXTS]
                start = number * SHARD_CONTEXTS * config.context
                _write_shard(config, path, model, site, here, start, max_norm, bar, stop)
    max_norm = json.loads((folder / META).read_text(encoding="utf-8"))["max_norm"]
    return _open(paths, tokens, max_norm)


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


def _max_norm(
    config: TrainConfig, folder: Path, model: nn.Module, site: Site, contexts: Tensor
) -> float:
    """`max_norm_ratio` medians of |x| over the first contexts, found once per harvest."""
    if not (folder / META).exists():
        x = read_site(model, site, contexts[:FORWARD_CONTEXTS])[:, config.skip_positions :]
        max_norm = x.float().norm(dim=-1).median().item() * config.max_norm_ratio
        write_json(folder / META, {"max_norm": max_norm, "site": str(site), "model": config.model})
    return json.loads((folder / META).read_text(encoding="utf-8"))["max_norm"]


def _length(contexts: Tensor, shard: int) -> int:
    return len(contexts[shard * SHARD_CONTEXTS :][:SHARD_CONTEXTS])


def _write_shard(
    config: TrainConfig,
    path: Path,
    model: nn.Module,
    site: Site,
    contexts: Tensor,
    start: int,
    max_norm: float,
    bar: tqdm,
    stop: Stop,
) -> None:
    values: list[Tensor] = []
    rows: list[Tensor] = []
    for batch in contexts.split(FORWARD_CONTEXTS):
        x = read_site(model, site, batch)
        keep = kept(config, x, max_norm)
        stored = x[keep].to(getattr(torch, config.activation_dtype)).cpu()
        if not stored.isfinite().all():
            raise TrainerError(
                f"an activation of {x[keep].abs().max().item():.3g} at {site} overflows "
                f"{config.activation_dtype}; set activation_dtype to bfloat16 or float32"
            )
        values.append(stored)
        rows.append(keep.flatten().nonzero().squeeze(1).cpu() + start)
        start += batch.numel()
        bar.update(batch.numel())
        stop.check(f"the harvest has every shard before {path.name}")
    with whole_file(path) as fresh:
        save_file({"x": torch.cat(values), "row": torch.cat(rows).to(torch.int32)}, fresh)


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
