"""What language models are asked: in the form of OpenAI's explainer, with examples of our own.

A token stands on a line of its own with its activation after a tab. Line breaks and tabs inside tokens are written as
\\n and \\t, so that a line stays a line; OpenAI's code leaves them, and then loses the tokens around them.
"""

from collections.abc import Sequence

from trainer.paper.interpretability.records import LEVELS, Record, quantise

UNKNOWN = "unknown"
_EXPLAIN = (
    "We study features of a neural network. Each feature looks for one particular thing in short texts. Look at the tokens "
    "for which the feature is active and say in a single short sentence what it looks for. Do not list examples.\n\n"
    f"Each line is token<tab>activation. Activations go from 0 to {LEVELS}; the higher, the better the match."
)
_SIMULATE = (
    "We study features of a neural network. Each feature looks for one particular thing in short texts. Read what the "
    "feature looks for and foretell its activation on each token.\n\nEach line is token<tab>activation. Activations go from 0 "
    f'to {LEVELS}, "{UNKNOWN}" stands for one that is not known. Most activations are 0.\n'
)
_JUDGE = "We study features of a neural network. Each feature looks for one particular thing in short texts."
_PREFIX = "this feature looks for"
_NONZERO_SHARE = 0.2
"""Of all tokens, below which OpenAI's explainer repeats those with an activation."""
_EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "words for animals",
        "The|0 old|0 dog|9 slept|0 while|0 two|0 cats|10 and|0 a|0 gold|2fish|7 watched|0 it|1.|0",
    ),
    (
        "amounts of money",
        "They|0 asked|0 for|0 thirty|6 dollars|10,|0 but|0 the|0 bill|3 came|0 to|0 $|9 forty|8.|0",
    ),
)
"""Explanations with tokens; each token ends in `|` and its activation."""


def explaining(train: Sequence[Record], largest: float) -> list[dict[str, str]]:
    """A chat that ends where the model is to explain the feature."""
    messages = [{"role": "system", "content": _EXPLAIN}]
    for number, (explanation, text) in enumerate(_EXAMPLES, 1):
        messages += [
            {"role": "user", "content": _activations(number, [_example(text)])},
            {"role": "assistant", "content": f"{_PREFIX} {explanation}"},
        ]
    rows = [
        list(zip(record.tokens, quantise(record.activations, largest), strict=True))
        for record in train
    ]
    ask = f"{_activations(len(_EXAMPLES) + 1, rows)}\nComplete: {_PREFIX}"
    return [*messages, {"role": "user", "content": ask}]


def explained(answer: str) -> str:
    """What the model found, without the words it was to begin with."""
    line = answer.strip().splitlines()[0].strip() if answer.strip() else ""
    if line.lower().startswith(_PREFIX):
        line = line[len(_PREFIX) :].strip()
    return line.rstrip(".")


def simulating(explanation: str, tokens: Sequence[str]) -> str:
    """A text whose last lines have an unknown activation for each of the tokens.

    In the examples unknown activations turn into numbers somewhere, so that the model holds a number possible at every one.
    """
    parts = [_SIMULATE]
    for number, (known, text) in enumerate(_EXAMPLES, 1):
        pairs = _example(text)
        shown = len(pairs) // 3
        lines = [
            line(token, UNKNOWN if place < shown else str(level))
            for place, (token, level) in enumerate(pairs)
        ]
        parts.append(_simulated(number, known, lines))
    lines = [line(token, UNKNOWN) for token in tokens]
    parts.append(_simulated(len(_EXAMPLES) + 1, explanation, lines).removesuffix("\n<end>\n"))
    return "\n".join(parts)


def detecting(explanation: str, tokens: Sequence[str]) -> str:
    """A question about a text, to be answered with Yes or No."""
    return (
        f"{_JUDGE}\n\nThe feature looks for: {explanation}\nText: {''.join(tokens).strip()}\n\n"
        "Question: Does the text contain what the feature looks for? Answer Yes or No.\nAnswer:"
    )


def agreeing(explanation: str, tokens: Sequence[str], marks: Sequence[bool]) -> str:
    """A question about marked tokens, to be answered with Yes or No."""
    return (
        f"{_JUDGE}\n\nThe feature looks for: {explanation}\nText: {marked(tokens, marks)}\n\n"
        "Question: Is everything between << and >> what the feature looks for? Answer Yes or No.\nAnswer:"
    )


def marked(tokens: Sequence[str], marks: Sequence[bool]) -> str:
    """The text, with << and >> around every run of marked tokens."""
    parts: list[str] = []
    inside = False
    for token, mark in zip(tokens, marks, strict=True):
        if mark != inside:
            parts.append("<<" if mark else ">>")
            inside = mark
        parts.append(token)
    return "".join([*parts, ">>" if inside else ""]).strip()


def line(token: str, activation: str) -> str:
    """One token with its activation."""
    plain = token.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")
    return f"{plain}\t{activation}"


def _activations(number: int, rows: Sequence[Sequence[tuple[str, int]]]) -> str:
    text = f"Feature {number}\nActivations:\n{_fragments(rows)}"
    active = [[pair for pair in row if pair[1] > 0] for row in rows]
    if sum(map(len, active)) < _NONZERO_SHARE * sum(map(len, rows)):
        text += f"\nThe same without zeros:\n{_fragments(active)}"
    return text


def _fragments(rows: Sequence[Sequence[tuple[str, int]]]) -> str:
    inner = "\n<end>\n<start>\n".join(
        "\n".join(line(token, str(level)) for token, level in row) for row in rows
    )
    return f"<start>\n{inner}\n<end>"


def _simulated(number: int, explanation: str, lines: Sequence[str]) -> str:
    return (
        f"\nFeature {number}\nThe feature looks for: {explanation}\nActivations:\n<start>\n"
        + "\n".join(lines)
        + "\n<end>\n"
    )


def _example(text: str) -> list[tuple[str, int]]:
    pairs: list[tuple[str, int]] = []
    token = ""
    rest = text
    while rest:
        token, _, rest = rest.partition("|")
        digits = len(rest) - len(rest.lstrip("0123456789"))
        pairs.append((token, int(rest[:digits])))
        rest = rest[digits:]
    return pairs
