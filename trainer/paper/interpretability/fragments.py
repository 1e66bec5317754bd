"""Fragments of held-out text, and what the model computes on them at the sites of the dictionaries."""

import copy
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from steer_server.dictionary.site import Site
from trainer.errors import BadCorpus
from trainer.files import whole_file
from trainer.model import device, read_sites, truncate
from trainer.paper.lab import Lab

REPLACEMENT = "\ufffd"
"""What an incomplete character decodes to; the paper throws away fragments that have one."""
_SHARD = 256
_AT_ONCE = 16
_ENCODED = 64


class Fragments(NamedTuple):
    """As many of equal length as were asked for, or as the held-out text has."""

    tokens: Tensor
    """fragments x (lead + length)"""
    lead: int
    """Tokens before each fragment that the model reads and nobody is shown: training leaves such positions out."""
    thrown: int
    """How many were left out because of incomplete characters or a document's end."""
    texts: list[list[str]]
    """Of the tokens after the lead."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()


def cut(lab: Lab, count: int, length: int, stride: int, lead: int) -> Fragments:
    """A fragment from a random place of every `stride` tokens of held-out text.

    Fragments with incomplete characters, or across the end of a document, are thrown away.
    """
    whole = lead + length
    context = max(stride, whole)
    contexts = lab.heldout(count * context, context)
    generator = torch.Generator().manual_seed(lab.config.seed)
    starts = torch.randint(context - whole + 1, (len(contexts), 1), generator=generator)
    tokens = contexts.gather(1, starts + torch.arange(whole))
    bad = torch.tensor([REPLACEMENT in text for text in lab.texts])
    bad[torch.tensor(lab.tokenizer.eos_token_id)] = True
    keep = ~bad[tokens.long()].any(dim=1)
    if not keep.any():
        raise BadCorpus(f"no fragment of {length} tokens is without incomplete characters")
    kept = tokens[keep]
    texts = [[lab.texts[token] for token in row] for row in kept[:, lead:].tolist()]
    return Fragments(kept, lead, int((~keep).sum()), texts)


class Activations:
    """What one model computes on the fragments at some sites, in a folder: memory holds a part at a time."""

    def __init__(self, folder: Path, fragments: Fragments) -> None:
        self._folder = folder
        self._fragments = fragments

    def collect(self, lab: Lab, model: nn.Module, sites: Sequence[Site], name: str) -> None:
        """Runs the model over fragments that are not in the folder; another call goes on where one was broken off."""
        body = _truncated(model, sites)
        parts = self._fragments.tokens.long().split(_SHARD)
        lead = self._fragments.lead
        with tqdm(desc=f"read {name}", total=len(self._fragments), unit=" fragments") as bar:
            for number, part in enumerate(parts):
                path = self._path(number)
                if not path.exists():
                    found: list[list[Tensor]] = []
                    for batch in part.split(_AT_ONCE):
                        lab.stop.check(f"activations of {number} parts of {len(parts)} are there")
                        xs = read_sites(body, sites, batch)
                        found.append([x[:, lead:].cpu() for x in xs])
                    stacked = [torch.cat(xs).contiguous() for xs in zip(*found, strict=True)]
                    with whole_file(path) as fresh:
                        content = {
                            str(site): x.clone() for site, x in zip(sites, stacked, strict=True)
                        }
                        save_file(content, fresh)
                bar.update(len(part))

    def pieces(self, site: Site) -> Iterator[Tensor]:
        """The site's x of all fragments, in order: fragments x tokens x d_model, in float32, where tensors are computed."""
        count = -(-len(self._fragments) // _SHARD)
        for number in range(count):
            for x in load_file(self._path(number))[str(site)].split(_ENCODED):
                yield x.to(device()).float()

    def remove(self) -> None:
        """What is on disk."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.safetensors"


def _truncated(model: nn.Module, sites: Sequence[Site]) -> nn.Module:
    """The model up to the last site; it shares the weights, and `model` stays whole."""
    shared: dict[int, Any] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return truncate(copy.deepcopy(model, shared), sites)
