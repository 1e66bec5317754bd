"""The Brown Corpus as readable prose: the tags stripped, and kept beside the text they belong to."""

from typing import Any

# How the corpus writes quotation marks, and how prose does.
_QUOTES = {"``": '"', "''": '"', "`": "'"}
_NO_SPACE_BEFORE = {",", ".", ";", ":", "?", "!", ")", "]", "''", "%"}
_NO_SPACE_AFTER = {"(", "[", "``", "`"}
# Every one of these is written twice in the corpus when it ends a sentence: "?/. ?/.".
_DOUBLED = {"?", "!", ";", ":"}


def read(source: str) -> dict[str, Any]:
    """`text`, and of each token its `words`, `tags` and `starts`: `text[start:][:len(word)] == word`.

    `source` has word/tag tokens, a sentence per line and blank lines between paragraphs.
    """
    text = ""
    words: list[str] = []
    tags: list[str] = []
    starts: list[int] = []
    for paragraph in _paragraphs(source):
        text += "\n\n" if text else ""
        space = False
        for word, tag, before, after in _spaced(paragraph):
            text += " " if space and before else ""
            starts.append(len(text))
            text += word
            words.append(word)
            tags.append(tag)
            space = after
    return {"text": text, "words": words, "tags": tags, "starts": starts}


def _paragraphs(source: str) -> list[list[tuple[str, str]]]:
    paragraphs: list[list[tuple[str, str]]] = [[]]
    for line in source.splitlines():
        tokens = [(word, tag) for word, _, tag in (t.rpartition("/") for t in line.split()) if word]
        heading = bool(tokens) and all("-hl" in tag for _, tag in tokens)
        if heading or not tokens:
            paragraphs += [tokens, []]
        else:
            paragraphs[-1] += tokens
    return [_as_printed(paragraph) for paragraph in paragraphs if paragraph]


def _as_printed(tokens: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without the marks that the corpus writes twice, and with stops inside closing quotes."""
    kept: list[tuple[str, str]] = []
    doubled = False
    for token in tokens:
        word, last = token[0], kept[-1][0] if kept else ""
        doubled = not doubled and word in _DOUBLED and word == last
        if doubled or (word == "." and last.endswith(".")):
            continue
        if word in (".", ",") and last == "''":
            kept.insert(len(kept) - 1, token)
        else:
            kept.append(token)
    return kept


def _spaced(paragraph: list[tuple[str, str]]) -> list[tuple[str, str, bool, bool]]:
    """Word as printed, tag, and whether a space may stand before and after it."""
    spaced: list[tuple[str, str, bool, bool]] = []
    opening = True
    for word, tag in paragraph:
        before, after = word not in _NO_SPACE_BEFORE, word not in _NO_SPACE_AFTER
        if word == tag == "'":  # one sign for both single quotes: they alternate
            before, after = opening, not opening
            opening = not opening
        spaced.append((_QUOTES.get(word, word), tag, before, after))
    return spaced
