"""The words' tags of a corpus, laid over its tokens.

A word's tag goes to the token that ends the word, by the tokeniser's character offsets; a token that ends several
words has none, and neither have the tokens before it. Tags are told apart by class (`coarse`).
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from trainer.corpus import tagged
from trainer.errors import BadConfig, BadCorpus
from trainer.stop import Stop

_KEY = 16
"""Tokens by which a document is recognised; shorter ones are left out."""


class Tags(NamedTuple):
    """Classes of tokens."""

    classes: list[str]
    """By number, most frequent first."""
    of: Tensor
    """The class of each token, -1 for none, int16, in the shape of the contexts."""

    def counts(self) -> list[int]:
        """Tokens of each class."""
        found = self.of[self.of >= 0].long()
        return torch.bincount(found, minlength=len(self.classes)).tolist()


def coarse(tag: str) -> str:
    """The class of a tag of the Brown Corpus: its first two letters, NN of nn, nns, nn$ and fw-nn-tl alike.

    Marks are their own class; a contraction of two words, such as `pps+bez`, has none.
    """
    stem = tag.removeprefix("fw-").partition("-")[0] or tag
    if "+" in stem:
        return ""
    letters = stem.rstrip("*$")
    return letters[:2].upper() if letters.isalpha() else stem


def lay(
    contexts: Tensor, specs: Iterable[str], tokenizer: PreTrainedTokenizerBase, stop: Stop
) -> Tags:
    """The tags of `contexts`, where they hold documents of the corpora that have tags.

    Documents are recognised by their first tokens, and tagged as far as all tokens agree.
    """
    flat = contexts.flatten().to(torch.int32).numpy()
    names: dict[str, int] = {}
    known = {
        ids[:_KEY].tobytes(): (ids, tags)
        for ids, tags in _tokenised(specs, tokenizer, names, stop)
        if len(ids) >= _KEY
    }
    if not known:
        raise BadCorpus(
            f"no document of {', '.join(specs)} has tags: a .jsonl file needs words, tags and starts beside text, "
            "as corpora/brown.jsonl of `python -m trainer corpus` has"
        )
    found = np.full(len(flat), -1, dtype=np.int16)
    # Documents begin after a separator, and each corpus begins with a context.
    after = np.flatnonzero(flat == tokenizer.eos_token_id) + 1
    for start in {*after.tolist(), *range(0, len(flat), contexts.shape[1])}:
        ids, tags = known.get(flat[start : start + _KEY].tobytes(), (flat[:0], found[:0]))
        here = flat[start:][: len(ids)]
        differing = np.flatnonzero(here != ids[: len(here)])
        length = differing[0] if len(differing) else len(here)
        found[start:][:length] = tags[:length]
    return _by_frequency(list(names), torch.from_numpy(found).view(contexts.shape))


def _tokenised(
    specs: Iterable[str], tokenizer: PreTrainedTokenizerBase, names: dict[str, int], stop: Stop
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Token ids and classes of each document; new classes are added to `names`."""
    if not tokenizer.is_fast:
        raise BadConfig("tags need a fast tokenizer, which says where in the text its tokens are")
    for record in tqdm(tagged(specs), desc="tags", unit=" documents"):
        stop.check("nothing of it is kept")
        encoded = tokenizer(
            record["text"],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        ends = np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
        yield (
            np.array(encoded["input_ids"], dtype=np.int32),
            _classes_of_tokens(record, ends, names),
        )


def _classes_of_tokens(
    record: dict[str, Any], ends: np.ndarray, names: dict[str, int]
) -> np.ndarray:
    word_ends = np.array(record["starts"]) + [len(word) for word in record["words"]]
    # The last of those that end there: a character may be several tokens.
    places = np.where(
        np.isin(word_ends, ends),
        np.searchsorted(ends, word_ends, side="right") - 1,
        np.searchsorted(ends, word_ends),
    )
    found = np.full(len(ends), -1, dtype=np.int16)
    words = np.bincount(places, minlength=len(ends))
    for place, tag in zip(places.tolist(), record["tags"], strict=True):
        name = coarse(tag)
        if words[place] == 1 and name:
            found[place] = names.setdefault(name, len(names))
    return found


def _by_frequency(names: list[str], of: Tensor) -> Tags:
    counts = Counter(of[of >= 0].tolist())
    order = sorted(counts, key=lambda number: (-counts[number], names[number]))
    ranks = torch.full((len(names) + 1,), -1, dtype=torch.int16)
    ranks[order] = torch.arange(len(order), dtype=torch.int16)
    return Tags([names[number] for number in order], ranks[of.long()])
