"""Documents as contexts of equal length, split into training and held-out ones."""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from trainer.config import TrainConfig
from trainer.corpus import documents
from trainer.errors import BadConfig, BadCorpus
from trainer.stop import Stop

SPECIAL_TOKENS = (
    "documents are tokenised without special tokens and joined by the end-of-sequence token"
)
_SHUFFLED_AT_ONCE = 10_000


def pack(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    stop: Stop,
    parts: Sequence[str] = ("train", "heldout"),
) -> dict[str, Tensor]:
    """`train` and `heldout` contexts, int32, contexts x config.context.

    Every `holdout_every`-th document of each corpus is held out. Each corpus gives its share of the
    tokens, or all it has.
    """
    total = sum(config.corpus.values())
    tokens = {"train": config.tokens, "heldout": config.eval_tokens}
    split: dict[str, list[Tensor]] = {part: [] for part in parts}
    with tqdm(desc="tokenise", total=sum(tokens[part] for part in parts), unit=" tokens") as bar:
        for spec, share in config.corpus.items():
            quota = {part: round(tokens[part] * share / total) for part in parts}
            for part, contexts in _pack_one(config, spec, quota, tokenizer, bar, stop).items():
                split[part].append(contexts)
    packed = {part: torch.cat(contexts) for part, contexts in split.items()}
    for part, contexts in packed.items():
        if not len(contexts):
            raise BadCorpus(
                f"the corpus has too little text for one {part} context of {config.context} tokens"
            )
    return packed


def _pack_one(
    config: TrainConfig,
    spec: str,
    quota: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
    bar: tqdm,
    stop: Stop,
) -> dict[str, Tensor]:
    if tokenizer.eos_token_id is None:
        raise BadConfig("the model's tokenizer has no end-of-sequence token to join documents with")
    streams: dict[str, list[int]] = {part: [] for part in quota}
    for index, text in _shuffled(spec, config.data_seed):
        stop.check("tokenising starts anew")
        held_out = index % config.holdout_every == config.holdout_every - 1
        part = "heldout" if held_out else "train"
        if part in quota and len(streams[part]) < quota[part]:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            streams[part] += [*ids, tokenizer.eos_token_id]
            bar.update(len(ids) + 1)
        if all(len(streams[name]) >= quota[name] for name in streams):
            break
    length = config.context
    packed: dict[str, Tensor] = {}
    for part, stream in streams.items():
        count = min(len(stream), quota[part]) // length
        packed[part] = torch.tensor(stream[: count * length], dtype=torch.int32).view(-1, length)
    return packed


def _shuffled(spec: str, seed: int) -> Iterator[tuple[int, str]]:
    """Numbered documents, in random order within windows that fit memory."""
    generator = random.Random(seed)
    window: list[tuple[int, str]] = []
    for numbered in enumerate(documents([spec])):
        window.append(numbered)
        if len(window) == _SHUFFLED_AT_ONCE:
            generator.shuffle(window)
            yield from window
            window = []
    generator.shuffle(window)
    yield from window
