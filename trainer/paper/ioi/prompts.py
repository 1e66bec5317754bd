"""Prompts of indirect object identification, and their counterfactuals (arXiv 2309.08600, section 4; templates as in 2211.00593).

"When Mary and John went to the store, John gave a drink to" asks for " Mary". The counterfactual is the same with
another name in Mary's place, so that it has as many tokens.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from trainer.errors import BadConfig

# A and B are names; the indirect object is the one that comes once.
_TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave {thing} to",
    "Then, {A} and {B} went to the {place}. {S} gave {thing} to",
    "While {A} and {B} were at the {place}, {S} handed {thing} to",
    "After {A} and {B} arrived at the {place}, {S} passed {thing} to",
    "Then, {A} and {B} had a long talk at the {place}. Afterwards {S} gave {thing} to",
    "Friends {A} and {B} met at the {place}. Before leaving, {S} offered {thing} to",
)
_PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
_THINGS = (
    "a drink",
    "a book",
    "a ring",
    "a basket",
    "a bone",
    "a letter",
    "a computer",
    "a flower",
)
_NAMES = """
Mary John Tom James Dan Sarah Paul David Anna Peter Mark George Jack Alice Robert Michael Emma William Charles Henry
Kate Jane Adam Frank Alex Jim Bob Bill Sam Ben Laura Lisa Susan Karen Ruth Helen Rose Grace Simon Joe Fred Harry Kevin
Brian Martin Andrew Richard Thomas Joseph Daniel Steve Scott Eric Ryan Jason Linda Julie Amy Rachel Rebecca Elizabeth
Victoria Lucy Claire Emily Jessica Maria Max Luke Jacob Matthew Stephen Edward Arthur Roger Philip Louis Carl Albert
""".split()


class Prompt(NamedTuple):
    """A prompt and its counterfactual, of equal length."""

    text: str
    tokens: tuple[int, ...]
    counterfactual: tuple[int, ...]
    answer: int
    """The indirect object, a token."""
    other: int
    """The counterfactual's."""
    at: int
    """The position where the two prompts differ."""


def names(tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """The first `count` names that are one token of this model after a space."""
    found = [name for name in _NAMES if len(_ids(tokenizer, f" {name}")) == 1]
    if len(found) < count or count < 3:
        raise BadConfig(
            f"ioi.names is {count}; from 3 to {len(found)} names are one token of this model"
        )
    return found[:count]


def draw(
    tokenizer: PreTrainedTokenizerBase, known: Sequence[str], count: int, seed: str
) -> list[Prompt]:
    """Half of them ABBA, half BABA, of three different names each; another `seed` gives others."""
    generator = random.Random(seed)
    return [_prompt(tokenizer, known, generator, abba=number % 2 == 0) for number in range(count)]


def _prompt(
    tokenizer: PreTrainedTokenizerBase,
    known: Sequence[str],
    generator: random.Random,
    *,
    abba: bool,
) -> Prompt:
    indirect, subject, other = generator.sample(known, 3)
    words = {
        "template": generator.choice(_TEMPLATES),
        "place": generator.choice(_PLACES),
        "thing": generator.choice(_THINGS),
    }

    def fill(name: str) -> str:
        first, second = (name, subject) if abba else (subject, name)
        parts = {"A": first, "B": second, "S": subject}
        return words["template"].format(**parts, place=words["place"], thing=words["thing"])

    text = fill(indirect)
    tokens, counterfactual = (_prompt_ids(tokenizer, fill(name)) for name in (indirect, other))
    answers = [_ids(tokenizer, f" {name}")[0] for name in (indirect, other)]
    differing = [
        i for i, pair in enumerate(zip(tokens, counterfactual, strict=True)) if len(set(pair)) > 1
    ]
    assert len(differing) == 1, text
    return Prompt(text, tokens, counterfactual, answers[0], answers[1], differing[0])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """As the model is prompted: with the tokens that its tokenizer puts first."""
    return tuple(tokenizer(text)["input_ids"])
