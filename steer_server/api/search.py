"""Features by words: what is searched, how a match is scored, and pages that cannot be mixed up."""

import base64
import binascii
import hashlib
import json
import struct
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from steer_server.dictionary.features import Evidence
from steer_server.dictionary.files import StoredDictionary
from steer_server.errors import InvalidRequest

MAX_QUERY_BYTES = 256
_PUNCTUATION = ".,;:!?'\"()[]{}<>*"
_DIGEST_BYTES = 12
_TOKEN = struct.Struct(f">I{_DIGEST_BYTES}s")


class Match(NamedTuple):
    """A feature that matches a query."""

    dictionary: str
    feature: int
    label: str
    score: float


def search(query: str, dictionaries: Mapping[str, StoredDictionary], evidence: bool) -> list[Match]:
    """All features that have every word of the query; best first, then by dictionary and index."""
    wanted = _fold(query)
    words = sorted(set(wanted.split()))
    found = []
    for name, stored in dictionaries.items():
        tokens = _evidence(stored) if evidence else {}
        for feature, label in _labels(stored):
            score = _score(label, tokens.get(feature, ""), wanted, words)
            if score:
                found.append(Match(name, feature, stored.evidence[feature].label, score))
    return sorted(found, key=lambda match: (-match.score, match.dictionary, match.feature))


def query_digest(query: str, dictionaries: Mapping[str, StoredDictionary], evidence: bool) -> bytes:
    """Equal for searches that have the same matches."""
    hashes = {name: stored.sha256 for name, stored in sorted(dictionaries.items())}
    content = json.dumps([query, hashes, evidence]).encode()
    return hashlib.sha256(content).digest()[:_DIGEST_BYTES]


def write_token(offset: int, digest: bytes) -> str:
    """What a client sends back for the page that begins with match `offset`."""
    return base64.urlsafe_b64encode(_TOKEN.pack(offset, digest)).decode()


def read_token(token: str, digest: bytes) -> int:
    """The offset; InvalidRequest if the token is not one of this search."""
    if not token:
        return 0
    try:
        offset, of = _TOKEN.unpack(base64.urlsafe_b64decode(token.encode()))
    except (struct.error, binascii.Error) as error:
        raise InvalidRequest("is not a token that this server gave", field="page_token") from error
    if of != digest:
        raise InvalidRequest(
            "belongs to another search, or the dictionaries have changed since; begin without one",
            field="page_token",
        )
    return offset


def _score(label: str, tokens: str, wanted: str, words: Sequence[str]) -> float:
    """In 0..1: the label itself, then whole words of it, then parts of words, then the evidence; 0 is no match.

    Of two labels with the same words the shorter one says more of them.
    """
    if label == wanted:
        return 1.0
    if all(word in label for word in words):
        share = min(1.0, sum(map(len, words)) / len(label))
        whole = _words(label).issuperset(words)
        return (0.6 if whole else 0.3) + 0.3 * share
    if not tokens or not all(word in label or word in tokens for word in words):
        return 0.0
    own = _words(label)
    return 0.2 if all(word in own or f" {word} " in tokens for word in words) else 0.1


_LABELS: WeakKeyDictionary[StoredDictionary, list[tuple[int, str]]] = WeakKeyDictionary()
_TOKENS: WeakKeyDictionary[StoredDictionary, dict[int, str]] = WeakKeyDictionary()
"""Of features with any evidence, folded: case and width do not count. They go with the dictionary, and hold few
objects: the collector stops every thread while it looks at them."""


def _labels(stored: StoredDictionary) -> list[tuple[int, str]]:
    if stored not in _LABELS:
        entries = sorted(stored.evidence.items())
        _LABELS[stored] = [(feature, _fold(entry.label)) for feature, entry in entries]
    return _LABELS[stored]


def _evidence(stored: StoredDictionary) -> dict[int, str]:
    """The words of each feature's tokens, with a blank around each."""
    if stored not in _TOKENS:
        _TOKENS[stored] = {
            feature: f" {' '.join(sorted(set(_tokens(entry))))} "
            for feature, entry in stored.evidence.items()
        }
    return _TOKENS[stored]


def _tokens(evidence: Evidence) -> Iterator[str]:
    """Those whose logit it raises, and those it fires on most in its examples."""
    for token, _ in evidence.logits_up:
        yield from _words(_fold(token))
    for example in evidence.examples:
        strongest = max(example.activations, default=0.0)
        if strongest > 0:
            yield from _words(_fold(example.tokens[example.activations.index(strongest)]))


def _words(folded: str) -> frozenset[str]:
    """With the punctuation around them, and without."""
    words = folded.split()
    return frozenset(words) | frozenset(filter(None, (w.strip(_PUNCTUATION) for w in words)))


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
