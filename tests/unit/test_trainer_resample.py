"""Dead features begin anew from what is explained worst, and live."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steer_server.dictionary.dictionary import Dictionary
from tests.unit.trainer_model import tiny_config
from trainer.architectures import ARCHITECTURES
from trainer.config import TrainConfig
from trainer.errors import BadConfig
from trainer.resample import resample_
from trainer.stack import Stack
from trainer.top_k import TopK

pytestmark = pytest.mark.usefixtures("one_thread")
D, FEATURES, TOKENS = 16, 12, 64


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return replace(tiny_config(tmp_path, tmp_path), n_features=FEATURES, dead_after=TOKENS)


def untied() -> dict[str, torch.Tensor]:
    """Feature i reads and writes 2 x_i."""
    rows = 2 * torch.eye(4)
    return {"W_enc": rows.clone(), "b_enc": torch.zeros(4), "W_dec": rows, "b_dec": torch.ones(4)}


def dictionary_of(parameters: dict[str, torch.Tensor]) -> Dictionary:
    p = {name: value.clone() for name, value in parameters.items()}
    return Dictionary(p["W_enc"].T, p["b_enc"], p["W_dec"], p["b_dec"])


def test_a_dead_feature_becomes_the_direction_of_the_token_that_is_explained_worst() -> None:
    p = untied()
    p["b_enc"][3] = -9.0
    before = {name: value.clone() for name, value in p.items()}
    dead = torch.tensor([False, False, False, True])
    # All but the second are b_dec, and are explained perfectly.
    x = torch.ones(3, 4)
    x[1] = torch.tensor([1.0, 1.0, 1.0, 4.0])
    silent = dictionary_of(p | {"W_enc": torch.zeros(4, 4)})

    resample_(p, untied(), dead, x, silent, torch.Generator().manual_seed(0))

    direction = torch.tensor([0.0, 0.0, 0.0, 1.0])
    torch.testing.assert_close(p["W_dec"][3], 2.0 * direction)
    torch.testing.assert_close(p["W_enc"][3], 0.2 * 2.0 * direction)
    assert p["b_enc"][3] == 0.0
    for name, value in before.items():
        assert torch.equal(p[name][:3], value[:3]), name
    assert torch.equal(p["b_dec"], before["b_dec"])


def test_tokens_are_drawn_by_the_square_of_their_squared_error_each_once() -> None:
    silent = {name: torch.zeros_like(value) for name, value in untied().items()}
    x = torch.diag(torch.tensor([1.0, 2.0, 0.0, 3.0]))
    drawn: Counter[int] = Counter()
    for seed in range(2000):
        p = {name: value.clone() for name, value in silent.items()}
        p["W_dec"] = torch.eye(4)
        dead = torch.tensor([True, False, False, True])
        resample_(p, silent, dead, x, dictionary_of(silent), torch.Generator().manual_seed(seed))
        chosen = p["W_dec"][dead].argmax(dim=1).tolist()
        assert len(set(chosen)) == 2
        drawn[chosen[0]] += 1

    # |x|^4 is 1, 16, 0, 81.
    for token, share in ((0, 1 / 98), (1, 16 / 98), (2, 0.0), (3, 81 / 98)):
        assert drawn[token] / 2000 == pytest.approx(share, abs=0.03), token


def test_what_is_explained_perfectly_leaves_all_as_it_is() -> None:
    p = untied()
    p["W_dec"] /= 4
    before = {name: value.clone() for name, value in p.items()}
    x = torch.ones(3, 4)
    found = dictionary_of(p | {"b_dec": torch.zeros(4)})
    x_hat = found.decode(found.encode(x))

    resample_(p, untied(), torch.tensor([True] * 4), x_hat, found, torch.Generator().manual_seed(0))

    for name, value in before.items():
        assert torch.equal(p[name], value), name


def moments_of(stack: Stack, features: slice) -> torch.Tensor:
    """Adam's of both encoder and decoder, of those features of the only member; a row for each tensor."""
    rows = [v[features] for n, v in stack.tensors().items() if "exp_avg" in n and v.ndim == 2]
    return torch.stack(rows).flatten(1)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_features_that_were_dead_fire_after_resampling(config: TrainConfig, name: str) -> None:
    sparsity = {"k": 4} if isinstance(ARCHITECTURES[name], TopK) else {"k": 0, "alpha": 1e-3}
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1))
    own = {"architecture": name, "aux_k": -1, "lr": 1e-4, "decay": 0.0, "warmup": 0} | sparsity
    stack = Stack([replace(config, **own, resample_every=3)], torch.zeros(D), 10)
    half = slice(FEATURES // 2)

    with torch.no_grad():
        stack.advance(x)
        stack.parameters["b_gate" if name == "gated" else "b_enc"][0, half] = -1e3
        stack.advance(x)
        share, moments = stack.dead_share()[0], moments_of(stack, half)
        stack.advance(x)
        share_after, moments_after = stack.dead_share()[0], moments_of(stack, half)
        fired = stack.advance(x).fired[0, half]

    assert share == 0.5
    assert share_after == 0.0
    assert moments.any(dim=1).all()
    assert not moments_after.any()
    assert fired.float().mean() > 0.5


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_training_that_goes_on_resamples_to_the_same_bits(config: TrainConfig, name: str) -> None:
    sparsity = {"k": 4} if isinstance(ARCHITECTURES[name], TopK) else {"k": 0, "alpha": 1e-3}
    own = replace(config, **{"architecture": name, "decay": 0.0, "resample_every": 3} | sparsity)
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(TOKENS, D, generator=generator) for _ in range(5)]
    unbroken, broken = (Stack([own], torch.zeros(D), 10) for _ in range(2))
    bias = unbroken.parameters["b_gate" if name == "gated" else "b_enc"]
    bias[0, : FEATURES // 2] = -1e3

    with torch.no_grad():
        for batch in x[:2]:
            unbroken.advance(batch)
        kept = {name: value.clone() for name, value in unbroken.tensors().items()}
        assert unbroken.dead_share()[0] == 0.5
        broken.restore(2, kept)
        for batch in x[2:]:
            unbroken.advance(batch)
            broken.advance(batch)

    assert (bias > -100).all()
    for name, value in unbroken.tensors().items():
        assert torch.equal(broken.tensors()[name], value), name


def test_no_feature_begins_anew_while_the_learning_rate_falls(config: TrainConfig) -> None:
    own = replace(config, architecture="relu", k=0, alpha=1e-3, decay=0.6, resample_every=5)
    stack = Stack([own], torch.zeros(D), 10)
    stack.parameters["b_enc"][0] = -1e3
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        for _ in range(9):
            stack.advance(x)

    assert stack.dead_share()[0] == 1.0


def test_a_negative_number_of_steps_is_refused(config: TrainConfig) -> None:
    with pytest.raises(BadConfig, match="resample_every is -1, it must not be negative"):
        replace(config, resample_every=-1)
