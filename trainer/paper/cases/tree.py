"""The causal tree of a feature: the earlier features without which it falls most, theirs, and so on."""

from typing import Any, NamedTuple

from steer_server.dictionary.files import StoredDictionary
from trainer.paper.cases.study import Study


class Node(NamedTuple):
    site: str
    feature: int
    tokens: list[tuple[str, float]]
    """The commonest kinds of token where it is strong."""
    fall: float
    """How much less active the node above is without it; 0 of the root."""
    fresh: float | None
    """The same in contexts that it was not chosen in, if there are such."""
    causes: list["Node"]


def tree(
    study: Study, stored: StoredDictionary, feature: int, about: dict[str, Any] | None = None
) -> Node:
    """Down to the sites that no parent comes before."""
    by_site = {str(parent.card.site): parent for parent in study.parents}
    about = about or {"tokens": study.tokens_of(stored, feature), "fall": 0.0, "fresh": None}
    below = [
        tree(study, by_site[found["site"]], cause["feature"], cause)
        for found in study.causes_of(stored, feature)
        for cause in found["causes"]
    ]
    tokens = [(kind, share) for kind, share in about["tokens"]]
    return Node(str(stored.card.site), feature, tokens, about["fall"], about["fresh"], below)
