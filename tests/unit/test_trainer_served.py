"""Activations from the serving engine, as far as they can be had without it; tests/e2e/test_trainer_served.py has it."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from steer_server.dictionary.card import Model
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.site import Site
from steer_server.generation import ActivationRows
from tests.unit.trainer_model import tiny_config, write_model
from trainer.config import TrainConfig
from trainer.difference import TOP, difference, same_top
from trainer.errors import BadConfig, TrainerError
from trainer.served import Coordinates, _fill, _identity, served
from trainer.stop import Stop

SITE = Site.parse("resid_post.1")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    model = write_model(tmp_path_factory.mktemp("model"))
    return replace(tiny_config(model, tmp_path_factory.mktemp("text")), source="vllm")


def test_without_vllm_it_is_said_what_to_install(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a test before this one has imported of it would still be found.
    for name in [name for name in sys.modules if name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "steer_server.engine", raising=False)

    with (
        pytest.raises(BadConfig, match=r'pip install "steer\[trainer,server-cpu\]"'),
        served(config, [SITE], Stop()),
    ):
        pass


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (SimpleNamespace(stream="attn_z", layer=1), "is not served by vLLM"),
        (Site("resid_post", 4), r"site resid_post.4 does not exist: the model has layers 0\.\.3"),
    ],
)
def test_a_site_that_vllm_cannot_read_is_refused_before_it_starts(
    config: TrainConfig, site: Site, message: str
) -> None:
    with pytest.raises(BadConfig, match=message), served(config, [SITE, site], Stop()):
        pass


def test_the_coordinates_are_x_bit_by_bit(tmp_path: Path) -> None:
    x = torch.randn(50, 24) * torch.logspace(-20, 20, 24)
    part = Coordinates(SITE, 8, 24)

    stored = _identity(part, 24, Model("", "", ""), tmp_path)

    assert torch.equal(stored.dictionary.encode(x), x[:, 8:])
    assert part.read_out.limit == 16


def test_an_activation_that_is_no_number_is_not_taken_for_0() -> None:
    table = np.zeros((3, 4), np.float32)
    features = np.array([3, 1, 0], np.uint32)
    rows = ActivationRows(
        0,
        "x",
        np.array([1, 2], np.uint32),
        np.array([0, 2, 3], np.uint32),
        features,
        np.array([5.0, -6.0, 7.0], np.float32),
        np.array([2, 1], np.uint32),
    )
    _fill(table, Coordinates(SITE, 0, 4), rows)

    assert table.tolist() == [[0, 0, 0, 0], [0, -6, 0, 5], [7, 0, 0, 0]]
    with pytest.raises(TrainerError, match=r"resid_post\.1 is not finite"):
        _fill(table, Coordinates(SITE, 0, 4), rows._replace(active=np.array([2, 2], np.uint32)))


def test_a_difference_is_relative_to_the_row() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 100.0]])

    found = difference(x, x + torch.tensor([[0.5, 0.0], [0.0, 1.0]]))

    assert (found.mean, found.max) == pytest.approx((0.055, 0.1))


def test_the_share_of_equal_top_features_counts_active_ones_only() -> None:
    dictionary = Dictionary.tied(torch.eye(TOP + 2), torch.zeros(TOP + 2))
    x = torch.zeros(3, TOP + 2)
    x[0, :4] = 1.0
    x[1] = torch.arange(TOP + 2.0)
    other = x.clone()
    other[0, 3], other[0, 9] = 0.0, 1.0
    other[1, -1] = 0.0

    expected = [3 / 4, (TOP - 1) / TOP, 1.0]

    assert same_top(dictionary, x, other) == pytest.approx(sum(expected) / 3)
