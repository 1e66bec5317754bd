"""A word's tag is on the token that ends it, and on no token of another text."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainer.errors import BadCorpus
from trainer.stop import Stop
from trainer.tagged import coarse, lay

WORDS = ["Rain", "fell", "on", "it", ".", '"']
TAGS = ["nn-hl", "vbd", "in", "ppo", ".", "''"]
TEXT = 'Rain fell on it."'


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """Pairs of characters, and the separator."""
    pieces = sorted(
        {(TEXT * 2)[place : place + 2] for place in range(len(TEXT))} | set(TEXT) | {"zz"}
    )
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<eos>", *pieces])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("..?"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")


def corpus(folder: Path) -> list[str]:
    """One document, three times over its text so that it is long enough to be known."""
    starts = [TEXT.index(word) for word in WORDS]
    all_starts = [start + part * len(TEXT) for part in range(3) for start in starts]
    record = {"text": TEXT * 3, "words": WORDS * 3, "tags": TAGS * 3, "starts": all_starts}
    (folder / "tagged.jsonl").write_text(json.dumps(record) + '\n{"text": "zzzz"}\n')
    return [str(folder / "tagged.jsonl")]


def test_the_token_that_ends_a_word_has_its_tag_and_one_that_ends_two_has_none(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    specs = corpus(tmp_path)
    ids = tokenizer(TEXT * 3, add_special_tokens=False)["input_ids"]

    tags = lay(torch.tensor([ids]), specs, tokenizer, Stop())

    pieces = tokenizer.convert_ids_to_tokens(ids)
    found = [tags.classes[tag] if tag >= 0 else "-" for tag in tags.of[0].tolist()]
    assert list(zip(pieces, found, strict=True))[:9] == [
        ("Ra", "-"),
        ("in", "NN"),
        (" f", "-"),
        ("el", "-"),
        ("l ", "VB"),
        ("on", "IN"),
        (" i", "-"),
        ("t.", "-"),
        ('"R', "''"),
    ]


def test_tags_end_where_the_text_is_another(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    specs = corpus(tmp_path)
    ids = tokenizer(TEXT * 3, add_special_tokens=False)["input_ids"]
    other = tokenizer("zz", add_special_tokens=False)["input_ids"]
    cut, eos = ids[:18], [tokenizer.eos_token_id]
    stream = torch.tensor(other * 3 + eos + cut + other + ids + [*eos, *ids]).view(1, -1)

    tags = lay(stream, specs, tokenizer, Stop()).of[0]

    alone = lay(torch.tensor([ids]), specs, tokenizer, Stop()).of[0]
    length = len(ids)
    assert (tags[:4] == -1).all()
    assert torch.equal(tags[4:22], alone[:18])
    assert (tags[22 : 23 + length] == -1).all()
    assert torch.equal(tags[-length:], alone)


def test_a_corpus_that_begins_with_a_context_is_tagged(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    specs = corpus(tmp_path)
    ids = tokenizer(TEXT * 3, add_special_tokens=False)["input_ids"]
    other = tokenizer("zz", add_special_tokens=False)["input_ids"]

    tags = lay(torch.tensor([other * len(ids), ids]), specs, tokenizer, Stop())

    assert (tags.of[0] == -1).all()
    assert (tags.of[1] >= 0).any()
    assert sum(tags.counts()) == int((tags.of >= 0).sum())


def test_classes_are_the_first_letters_of_tags() -> None:
    found = [coarse(tag) for tag in ("nns$", "fw-nn-tl", "bedz*", "pps+bez", "``", "--", "vbn-hl")]

    assert found == ["NN", "NN", "BE", "", "``", "--", "VB"]


def test_a_corpus_without_tags_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "plain.jsonl").write_text('{"text": "zzzz"}\n')

    with pytest.raises(BadCorpus, match="needs words, tags and starts"):
        lay(torch.zeros(1, 8), [str(tmp_path / "plain.jsonl")], tokenizer, Stop())
