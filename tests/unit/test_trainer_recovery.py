"""Every architecture finds the features that made the data, where there are few of them and they are sparse."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from steer_server.dictionary.dictionary import Dictionary
from trainer.architectures import ARCHITECTURES
from trainer.config import TrainConfig, from_mapping
from trainer.stack import Stack

pytestmark = pytest.mark.usefixtures("one_thread")

D, TRUE, ACTIVE, STEPS, BATCH = 24, 32, 2.0, 1500, 256
"""A token has `ACTIVE` of the `TRUE` features on average."""
SPARSITY = {
    "tied_relu": {"alpha": 1.0},
    "relu": {"alpha": 1.0},
    "gated": {"alpha": 2.0},
    "jump_relu": {"alpha": 1.0, "sparsity_warmup": 200},
    "top_k": {"k": int(ACTIVE) + 1},
}


def config(name: str) -> TrainConfig:
    return from_mapping(
        {
            "model": "none",
            "site": "resid_post.0",
            "corpus": {"none.txt": 1.0},
            "out": name,
            "tokens": STEPS * BATCH,
            "n_features": TRUE + 8,
            "architecture": name,
            "lr": 3e-3,
            "dead_after": 20_000,
            "prefixes": [0.9],
            **SPARSITY.get(name, {"k": int(ACTIVE)}),
        }
    )


def batches(true: Tensor) -> Iterator[Tensor]:
    """Of mean square D, as a harvest is scaled."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        on = torch.rand(BATCH, TRUE, generator=generator) < ACTIVE / TRUE
        f = on * (0.5 + torch.rand(BATCH, TRUE, generator=generator))
        x = f @ true
        yield x * (D / x.square().sum(dim=1).mean()).sqrt()


def found(dictionary: Dictionary, true: Tensor) -> Tensor:
    """The largest cosine of any of its rows with each true feature."""
    rows = torch.nn.functional.normalize(dictionary.W_dec, dim=1)
    return (true @ rows.T).amax(dim=1)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_features_that_made_the_data_are_found(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.nn.functional.normalize(torch.randn(TRUE, D, generator=generator), dim=1)
    stack = Stack([config(name)], torch.zeros(D), STEPS)

    with torch.no_grad():
        for x in batches(true):
            outcome = stack.advance(x)

    (dictionary,) = stack.dictionaries(1.0)
    cosines = found(dictionary, true)
    assert cosines.mean() > 0.94, cosines
    assert outcome.fvu[0] < 0.15
    assert outcome.l0[0] < 3 * ACTIVE


def test_after_a_short_training_a_threshold_lets_through_as_many_as_in_its_end() -> None:
    """While a dictionary learns, its threshold falls far."""
    steps = 150
    generator = torch.Generator().manual_seed(0)
    true = torch.nn.functional.normalize(torch.randn(TRUE, D, generator=generator), dim=1)
    stack = Stack([config("batch_top_k")], torch.zeros(D), steps)
    drawn = batches(true)

    with torch.no_grad():
        for _ in range(steps):
            outcome = stack.advance(next(drawn))
        (dictionary,) = stack.dictionaries(1.0)
        f = dictionary.encode(torch.cat([next(drawn) for _ in range(4)]))

    assert (f > 0).sum(dim=1).float().mean() == pytest.approx(outcome.l0[0].item(), rel=0.05)
