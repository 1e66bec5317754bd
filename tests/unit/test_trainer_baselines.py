"""Baselines are the directions they are called, and are made, measured and saved as dictionaries are."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steer_server.dictionary.files import load
from steer_server.dictionary.site import Site
from tests.unit.trainer_model import WORDS, tiny_config, write_model
from trainer.baselines import fit, names
from trainer.config import TrainConfig
from trainer.errors import BadConfig, Interrupted
from trainer.harvest import Activations, harvest
from trainer.run import run
from trainer.stop import Stop

D = 16


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    tiny = tiny_config(write_model(tmp_path / "model"), tmp_path)
    return replace(tiny, alpha=0.0, n_features=D)


@pytest.fixture
def x() -> Tensor:
    """Far from the origin, and longer along some directions than along others."""
    generator = torch.Generator().manual_seed(0)
    return 3 + torch.randn(500, D, generator=generator) @ torch.randn(D, D, generator=generator)


def activations(x: Tensor) -> Activations:
    """Contexts of ten."""
    contexts = torch.zeros(len(x) // 10, 10, dtype=torch.int32)
    shards, rows = [x[:200], x[200:]], [torch.arange(200), torch.arange(200, len(x))]
    site = Site.parse("resid_post.1")
    return Activations(shards, rows, contexts, contexts, float("inf"), site)


def unexplained(x: Tensor, x_hat: Tensor) -> float:
    return ((x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum()).item()


def test_pca_leaves_the_variance_of_the_other_components(config: TrainConfig, x: Tensor) -> None:
    few = replace(config, architecture="pca", n_features=5)

    dictionary = fit(few, activations(x), Stop())

    variances = torch.linalg.svdvals((x - x.mean(dim=0)).double()).square()
    expected = (variances[5:].sum() / variances.sum()).item()
    assert unexplained(x, dictionary.decode(dictionary.encode(x))) == pytest.approx(expected, 1e-4)


@pytest.mark.parametrize("kind", ["pca", "basis"])
def test_all_directions_of_an_orthonormal_baseline_leave_nothing(
    config: TrainConfig, x: Tensor, kind: str
) -> None:
    dictionary = fit(replace(config, architecture=kind), activations(x), Stop())

    torch.testing.assert_close(dictionary.decode(dictionary.encode(x)), x, rtol=1e-4, atol=1e-4)


def test_with_a_k_the_largest_coordinates_by_size_are_kept(config: TrainConfig, x: Tensor) -> None:
    both = replace(config, architecture="pca", k=3)
    coordinates = fit(replace(both, k=0), activations(x), Stop()).encode(x)

    dictionary = fit(both, activations(x), Stop())
    f = dictionary.encode(x)

    assert dictionary.n_features == 2 * D
    assert (f.count_nonzero(dim=1) == 3).all()
    expected = coordinates.abs().topk(3, dim=1).values
    torch.testing.assert_close(f.topk(3, dim=1).values, expected, rtol=1e-4, atol=1e-4)


def test_ica_finds_independent_sources(config: TrainConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    sources = torch.rand(4000, 3, generator=generator) - 0.5
    mixing = torch.tensor([5.0, 2.0, 1.0])[:, None] * torch.randn(3, D, generator=generator)
    few = replace(config, architecture="ica", n_features=3, ica_rows=3000)

    dictionary = fit(few, activations(7 + sources @ mixing), Stop())

    x = 7 + sources @ mixing
    f = dictionary.encode(x)
    directions = torch.nn.functional.normalize(mixing, dim=1)
    cosines = (dictionary.W_dec @ directions.T).abs()
    assert (cosines.diagonal() > 0.99).all(), cosines
    torch.testing.assert_close(dictionary.decode(f), x, rtol=1e-3, atol=1e-3)
    assert f.var(dim=0).argsort(descending=True).tolist() == [0, 1, 2]
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(3))


def test_ica_stops_at_its_next_step(config: TrainConfig, x: Tensor) -> None:
    class AtItsFirstStep(Stop):
        def check(self, saved: str) -> None:
            self.requested = saved == "ICA starts anew"
            super().check(saved)

    stop = AtItsFirstStep()

    with pytest.raises(Interrupted, match="ICA starts anew"):
        fit(replace(config, architecture="ica"), activations(x), stop)


def test_the_difference_of_means_is_of_a_class_and_all_others(config: TrainConfig) -> None:
    few = replace(config, architecture="diff_mean", n_features=4, holdout_every=60)
    found = harvest(few, [Site.parse(few.site)], Path(few.out).parent / "harvest", Stop())
    (here,) = found.values()
    nouns = {2 + WORDS.split().index(word) for word in ("cat", "dog", "mat", "house")}
    tokens = here.train.flatten()[torch.cat(here.rows).long()]
    is_noun = torch.tensor([token in nouns for token in tokens.tolist()])
    is_word = tokens != 1
    x = torch.cat(here.shards)

    dictionary = fit(few, here, Stop())

    assert names(few, here, Stop())[:2] == ["JJ", "NN"]
    expected = x[is_noun].mean(dim=0) - x[~is_noun & is_word].mean(dim=0)
    cosine = torch.cosine_similarity(dictionary.W_dec[1], expected, dim=0)
    assert cosine.item() == pytest.approx(1.0, abs=1e-4)


def test_random_directions_come_from_the_seed(config: TrainConfig, x: Tensor) -> None:
    some = replace(config, architecture="random", n_features=40)

    rows = [fit(replace(some, seed=seed), activations(x), Stop()).W_dec for seed in (1, 1, 2)]

    assert torch.equal(rows[0], rows[1])
    assert not torch.allclose(rows[0], rows[2])
    torch.testing.assert_close(rows[0].norm(dim=1), torch.ones(40))


def test_more_components_than_there_are_is_an_error(config: TrainConfig, x: Tensor) -> None:
    with pytest.raises(BadConfig, match="pca has 16 of this model"):
        fit(replace(config, architecture="pca", n_features=17), activations(x), Stop())


def test_baselines_are_part_of_a_sweep(config: TrainConfig) -> None:
    kinds = {"pca": 0, "ica": 3, "random": 3, "basis": 3, "diff_mean": 2, "top_k": 3}
    few = {"diff_mean": 8}
    configs = [
        replace(
            config,
            architecture=kind,
            k=k,
            n_features=few.get(kind, D),
            out=f"{config.out}-{kind}",
        )
        for kind, k in kinds.items()
    ]

    cards = run(configs, Path(config.out).parent / "runs", Stop())

    assert [card.architecture for card in cards] == list(kinds)
    for card, one in zip(cards, configs, strict=True):
        assert load(Path(one.out)).card == card
        assert card.quality is not None
    assert cards[0].quality is not None
    assert cards[0].quality.fvu < 1e-3
    labels = {e.feature: e.label for e in load(Path(configs[4].out)).evidence.values()}
    assert set(labels.values()) >= {"NN", "not NN", "VB", "not VB"}


def test_baselines_that_differ_in_k_alone_are_fitted_once(config: TrainConfig, x: Tensor) -> None:
    few, known = replace(config, architecture="ica", n_features=3), {}

    whole, top = (fit(replace(few, k=k), activations(x), Stop(), known) for k in (0, 2))
    fit(replace(few, seed=5), activations(x), Stop(), known)

    assert len(known) == 2
    assert torch.equal(top.W_dec, torch.cat([whole.W_dec, -whole.W_dec]))
