"""The server that the suite asks, with something to refuse for every bound."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from steer.v1 import edits_pb2

from steer_server.api.admin import Operations
from steer_server.api.presets import Preset, Presets
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.features import FeatureStatistics
from steer_server.dictionary.files import WEIGHTS, StoredDictionary, save
from steer_server.dictionary.site import Site
from tests.unit.serving import D_MODEL, NAME, card_for, serving, small_dictionary


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.conformance)


def _rows(n_features: int, d_model: int = D_MODEL) -> torch.Tensor:
    rows = torch.randn(n_features, d_model, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.normalize(rows, dim=1)


def _of(dictionary: Dictionary) -> StoredDictionary:
    card = replace(
        small_dictionary().card, d_model=dictionary.d_model, n_features=dictionary.n_features
    )
    return replace(small_dictionary(), card=card, dictionary=dictionary, evidence={})


@functools.cache
def dictionaries() -> dict[str, StoredDictionary]:
    small = small_dictionary()
    return {
        # More active features on every token than a token can list.
        "dense": _of(Dictionary.tied(_rows(4200), torch.full((4200,), 1000.0))),
        "wide": _of(Dictionary.tied(_rows(16, D_MODEL + 1), torch.zeros(16))),
        "elsewhere": replace(small, card=replace(small.card, site=Site.parse("resid_post.2"))),
    }


def _preset(feature: int) -> Preset:
    edit = edits_pb2.Edit(dictionary=NAME, feature=feature, ablate=edits_pb2.Ablate())
    return Preset("", (edit,))


def _save(folder: Path, **card) -> None:
    dictionary = Dictionary.tied(_rows(16), torch.zeros(16))
    made = replace(card_for(dictionary, "second"), **card)
    save(folder, made, dictionary, FeatureStatistics.zeros(16))


@pytest.fixture(scope="package")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dictionary_root`."""
    root = tmp_path_factory.mktemp("root")
    _save(root / "second")
    _save(root / "inner", site=Site.parse("mlp_act.1"))
    _save(root / "unnamed", name="Not A Name")
    _save(root / "broken")
    weights = root / "broken" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    outside = tmp_path_factory.mktemp("outside")
    (root / "link").symlink_to(outside)
    return root


@pytest.fixture(scope="package")
async def service(root: Path):
    async with serving(
        watch={NAME: (3,)},
        more=dictionaries(),
        operations=Operations(root),
        presets=Presets({"gardens": _preset(4), "plants": _preset(4)}),
    ) as running:
        yield running
