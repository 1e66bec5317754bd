"""How far what transformers and vLLM make of the same tokens is apart, site by site."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.files import StoredDictionary, load
from steer_server.dictionary.site import Site
from steer_server.program import ENTRY_BYTES
from trainer.config import TrainConfig
from trainer.errors import BadConfig
from trainer.harvest import FORWARD_CONTEXTS, kept, longest_kept
from trainer.model import Read, load_model, load_tokenizer, read_sites, shape_of, truncate
from trainer.served import served
from trainer.stop import Stop
from trainer.tokens import pack

TOP = 32
"""Strongest features of a token that are compared."""
_ROWS = 1024


@dataclass(frozen=True)
class Difference:
    """Of rows of x from the same rows of another source."""

    mean: float
    """Of |x' - x| / |x|."""
    max: float
    same_top: dict[str, float]
    """By dictionary: share of a token's strongest features that are so in both."""


@dataclass(frozen=True, eq=False)
class Sample:
    """What a source made of the contexts."""

    x: dict[Site, Tensor]
    """contexts x positions x d_model."""
    seconds_to_start: float
    tokens_per_second: float
    """From the second batch on, if there are several."""


def difference(x: Tensor, other: Tensor, stored: Sequence[StoredDictionary] = ()) -> Difference:
    """Of `other` from `x`, both rows x d_model."""
    x, other = x.float(), other.float()
    size = (other - x).norm(dim=-1) / x.norm(dim=-1)
    same = {entry.card.name: same_top(entry.dictionary, x, other) for entry in stored}
    return Difference(size.mean().item(), size.max().item(), same)


def same_top(dictionary: Dictionary, x: Tensor, other: Tensor) -> float:
    """Mean over rows of the share that both have of the `TOP` strongest active features; 1 where none is active."""
    shares = []
    for parts in zip(x.split(_ROWS), other.split(_ROWS), strict=True):
        mine, theirs = (_strongest(dictionary, part) for part in parts)
        larger = torch.maximum(mine.sum(dim=1), theirs.sum(dim=1))
        both = (mine & theirs).sum(dim=1)
        shares.append(torch.where(larger > 0, both / larger, 1.0))
    return torch.cat(shares).mean().item()


def compare(
    config: TrainConfig, sites: Sequence[Site], tokens: int, folders: Sequence[Path], stop: Stop
) -> str:
    """A table of the sources' speed and of their `Difference` from transformers in float32.

    It is about the rows that a dictionary would be trained on, in all precisions, and with contexts that vLLM computes
    in chunks; for each of these vLLM is started anew.
    """
    stored = [load(folder, shape_of(config.model)) for folder in folders]
    for entry in stored:
        if entry.card.site not in sites:
            raise BadConfig(
                f"dictionary {entry.card.name!r} is of site {entry.card.site}, the configuration is of "
                f"{', '.join(map(str, sites))}; take --set site={entry.card.site}"
            )
    torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(config.model)
    contexts = pack(replace(config, tokens=tokens), tokenizer, stop, ["train"])["train"]
    exact = replace(config, source="vllm", served_dtype="float32")
    short = replace(exact, served_dtype="bfloat16")
    chunk = max(config.context // 4, 1)
    sources: dict[str, AbstractContextManager[Read]] = {
        "transformers, bfloat16": _transformers(config, sites, torch.bfloat16),
        "vLLM, float32": served(exact, sites, stop),
        f"vLLM, float32, chunks of {chunk}": served(exact, sites, stop, chunk),
        "vLLM, bfloat16": served(short, sites, stop),
    }
    first = "transformers, float32"
    reference = _sample(first, _transformers(config, sites, torch.float32), sites, contexts, stop)
    keep = {site: kept(config, x, longest_kept(config, x)) for site, x in reference.x.items()}
    lines = [_speed(first, reference)]
    by_site: dict[Site, list[str]] = {site: [] for site in sites}
    for name, source in sources.items():
        found = _sample(name, source, sites, contexts, stop)
        lines.append(_speed(name, found))
        for site, x in reference.x.items():
            here = [entry for entry in stored if entry.card.site == site]
            row = difference(x[keep[site]], found.x[site][keep[site]], here)
            by_site[site].append(_row(name, row))
    for site, rows in by_site.items():
        lines += ["", f"{site}, {int(keep[site].sum()):,} rows, from {first}", _HEAD, *rows]
    width = reference.x[sites[0]].shape[-1]
    lines += ["", f"vLLM's read-outs: {ENTRY_BYTES * width:,} bytes per token and site"]
    return "\n".join(lines)


def _strongest(dictionary: Dictionary, x: Tensor) -> Tensor:
    """Which features are, rows x n_features."""
    f = dictionary.encode(x)
    top = f.abs().topk(min(TOP, dictionary.n_features), dim=1).indices
    return torch.zeros_like(f, dtype=torch.bool).scatter(1, top, True) & (f != 0)


@contextmanager
def _transformers(config: TrainConfig, sites: Sequence[Site], dtype: torch.dtype) -> Iterator[Read]:
    model = truncate(load_model(config.model), sites)
    yield partial(read_sites, model.to(dtype))


def _sample(
    name: str,
    source: AbstractContextManager[Read],
    sites: Sequence[Site],
    contexts: Tensor,
    stop: Stop,
) -> Sample:
    batches = contexts.split(FORWARD_CONTEXTS)
    began, times, found = time.perf_counter(), [], []
    with source as read, tqdm(desc=name, total=contexts.numel(), unit=" tokens") as bar:
        times.append(time.perf_counter())
        for batch in batches:
            stop.check("a comparison starts anew")
            found.append([x.cpu() for x in read(sites, batch)])
            times.append(time.perf_counter())
            bar.update(batch.numel())
    start = 1 if len(batches) > 1 else 0
    tokens = sum(batch.numel() for batch in batches[start:])
    x = {
        site: torch.cat(parts) for site, parts in zip(sites, zip(*found, strict=True), strict=True)
    }
    return Sample(x, times[0] - began, tokens / (times[-1] - times[start]))


def _speed(name: str, sample: Sample) -> str:
    return f"{name:<32}{sample.tokens_per_second:>8,.0f} tokens/s after {sample.seconds_to_start:.0f} s"


_HEAD = f"{'':<32}{'mean |dx|/|x|':>14}{'largest':>10}"


def _row(name: str, row: Difference) -> str:
    same = [f"{share:>8.2%} of the top {TOP} of {of}" for of, share in row.same_top.items()]
    return f"{name:<32}{row.mean:>14.2g}{row.max:>10.2g}{''.join(same)}"
