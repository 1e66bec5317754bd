"""The direction that a starting engine writes and reads at each site to prove that the site works."""

from pathlib import Path

import torch

from steer_server.dictionary.card import Card, Model
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.features import FeatureStatistics
from steer_server.dictionary.files import WEIGHTS, StoredDictionary
from steer_server.dictionary.site import Site


def sentinel(site: Site, d_model: int) -> StoredDictionary:
    """A dictionary of one fixed random direction of unit length; the same in every process."""
    vector = torch.randn(1, d_model, generator=torch.Generator().manual_seed(0))
    dictionary = Dictionary.directions(torch.nn.functional.normalize(vector))
    card = Card.of(
        dictionary,
        name=f"self-test.{site}",
        model=Model("", "", ""),
        site=site,
        architecture="directions",
        files={WEIGHTS: "self-test"},
    )
    return StoredDictionary(Path(), card, dictionary, FeatureStatistics.zeros(1), {})
