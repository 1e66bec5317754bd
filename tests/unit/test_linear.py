"""The fast product is the product: against float64, whatever the shapes and strides, and where it may not be taken."""

import pytest
import torch
from torch.testing import assert_close

from steer_server.dictionary import linear as module
from steer_server.dictionary.linear import linear, pack
from tests.unit.strategies import normal

FEATURES, D = 1024, 256


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Says which calls went to torch's own product."""
    calls: list[str] = []
    plain = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda *a: (calls.append("torch"), plain(*a))[1]
    )
    return calls


@pytest.mark.parametrize("rows", [0, 1, 3, 17, 300])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_wide_product_is_exact_and_onednns(
    rows: int, relu: bool, biased: bool, taken: list[str]
) -> None:
    x, weight = normal(1, rows, D).float(), normal(2, FEATURES, D).float()
    # Every other number, so that it is not contiguous.
    bias = normal(3, FEATURES, 2).float()[:, 0] if biased else None

    z = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    expected = z.clamp(min=0) if relu else z
    assert_close(linear(x, weight, bias, relu).double(), expected, atol=1e-4, rtol=1e-5)
    assert_close(
        linear(x.T.contiguous().T, weight, bias, relu), expected.float(), atol=1e-4, rtol=1e-5
    )
    weight = weight.T.contiguous().T
    assert_close(linear(x, weight, bias, relu), expected.float(), atol=1e-4, rtol=1e-5)
    again = linear(x, weight, bias, relu, pack(weight))
    assert_close(again, expected.float(), atol=1e-4, rtol=1e-5)
    if module._ONEDNN:
        assert not taken


def test_it_is_torchs_where_a_gradient_is_wanted_and_where_it_is_small(taken: list[str]) -> None:
    x = normal(1, 3, D).float().requires_grad_()
    weight = normal(2, FEATURES, D).float()
    linear(x, weight, relu=True).sum().backward()
    assert x.grad is not None
    bias = torch.zeros(FEATURES, requires_grad=True)
    linear(x.detach(), weight, bias).sum().backward()
    assert bias.grad is not None
    assert pack(weight[:8]) is None
    assert pack(weight.double()) is None
    linear(x.detach(), weight[:8])
    linear(x.detach().double(), weight.double())

    assert len(taken) == 4
