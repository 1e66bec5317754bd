"""Dictionaries made on the spot for a model."""

from pathlib import Path

import torch
from transformers import AutoConfig

from steer_server.dictionary.card import Card, Model, config_digest, model_shape
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.features import FeatureStatistics
from steer_server.dictionary.files import StoredDictionary, load, save
from steer_server.dictionary.site import Site


def make_dictionary(
    model: Path,
    site: Site,
    folder: Path,
    per_dimension: int = 4,
    bias: float = -1.0,
    seed: int | None = None,
) -> StoredDictionary:
    """Random unit rows, `per_dimension` for each of the model's, named like the folder.

    The bias decides how many are active: -1 leaves some fifth of them on a token of a tiny model.
    """
    shape = model_shape(AutoConfig.from_pretrained(model))
    d_model = shape["hidden_size"]
    n_features = per_dimension * d_model
    generator = torch.Generator().manual_seed(site.layer if seed is None else seed)
    rows = torch.randn(n_features, d_model, generator=generator)
    dictionary = Dictionary.tied(
        torch.nn.functional.normalize(rows, dim=1), torch.full((n_features,), bias)
    )
    card = Card.of(
        dictionary,
        name=folder.name,
        model=Model(model.name, "", config_digest(shape)),
        site=site,
        architecture="tied_relu",
    )
    save(folder, card, dictionary, FeatureStatistics.zeros(n_features))
    return load(folder, shape)
