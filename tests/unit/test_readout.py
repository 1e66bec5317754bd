"""Read-outs of the strongest features on a CPU against whole rows, sorted, for several activation functions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from steer_server.dictionary.dictionary import Activation, Dictionary
from steer_server.dictionary.site import Site
from steer_server.program import ReadOut
from steer_server.vllm_plugin import residents as residents_module
from steer_server.vllm_plugin.bank import Bank
from steer_server.vllm_plugin.readout import Want, readings
from steer_server.vllm_plugin.report import RowBlock
from steer_server.vllm_plugin.residents import Resident, Residents
from steer_server.vllm_plugin.transfer import Transfer

D_MODEL, N_FEATURES, N_ROWS = 16, 40, 6
SITE = Site.parse("resid_post.0")


@pytest.fixture(params=["relu", "top_k", "top_k of all", "jump_relu", "directions"])
def dictionary(request: pytest.FixtureRequest) -> Dictionary:
    torch.manual_seed(0)
    encoder, decoder = torch.randn(D_MODEL, N_FEATURES), torch.randn(N_FEATURES, D_MODEL)
    parts = encoder, torch.randn(N_FEATURES), decoder, torch.zeros(D_MODEL)
    match request.param:
        case "relu":
            return Dictionary(*parts, Activation.RELU)
        case "top_k":
            return Dictionary(*parts, Activation.TOP_K, k=5)
        case "top_k of all":
            return Dictionary(*parts, Activation.TOP_K, k=N_FEATURES)
        case "jump_relu":
            return Dictionary(*parts, Activation.JUMP_RELU, threshold=torch.rand(N_FEATURES) * 4)
        case _:
            return Dictionary(*parts, Activation.IDENTITY)


@pytest.mark.parametrize(
    "spec", [ReadOut("d", top_k=3), ReadOut("d", top_k=12), ReadOut("d", above=1.5)]
)
def test_the_strongest_of_each_row_are_listed(dictionary: Dictionary, spec: ReadOut) -> None:
    residents = Residents(
        [SITE], [0], {0: Bank(4, D_MODEL, torch.device("cpu"))}, torch.device("cpu")
    )
    residents.add("d", SITE, dictionary)
    (reading,) = readings([(residents["d"], Want(0, 0, spec, 1, N_ROWS))], kernels=False)
    x = torch.randn(N_ROWS, D_MODEL)

    block = reading.block(
        Transfer(reading.encode(reading.rows_of(x))).wait(), np.arange(N_ROWS), 0.0
    )

    f = dictionary.encode(x[1:]).numpy()
    assert block.active is not None
    assert_array_equal(block.active, np.count_nonzero(f, axis=1))
    stops = np.cumsum(block.counts)
    for row, stop in enumerate(stops):
        order = np.argsort(-np.abs(f[row]), kind="stable")
        expected = order[np.abs(f[row, order]) > (spec.above or 0)][: spec.limit]
        listed = slice(stop - block.counts[row], stop)
        assert_array_equal(block.features[listed], expected)
        assert_allclose(block.values[listed], f[row, expected], rtol=1e-5)


@pytest.mark.parametrize(
    "spec", [ReadOut("d", top_k=12), ReadOut("d", above=1.5), ReadOut("d", features=(0, 7, 39))]
)
def test_a_long_prefill_is_read_in_parts_and_the_same(
    dictionary: Dictionary, spec: ReadOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    residents = Residents(
        [SITE], [0], {0: Bank(4, D_MODEL, torch.device("cpu"))}, torch.device("cpu")
    )
    residents.add("d", SITE, dictionary)
    (reading,) = readings([(residents["d"], Want(0, 0, spec, 1, N_ROWS))], kernels=False)
    x = torch.randn(N_ROWS, D_MODEL)
    heights = []

    def measured(encode: Callable[[Resident, torch.Tensor], torch.Tensor]) -> Any:
        def call(resident: Resident, rows: torch.Tensor) -> torch.Tensor:
            heights.append(len(rows))
            return encode(resident, rows)

        return call

    def block() -> RowBlock:
        return reading.block(
            Transfer(reading.encode(reading.rows_of(x))).wait(), np.arange(N_ROWS), 0.0
        )

    whole = block()
    for name in ("encode", "preactivations"):
        monkeypatch.setattr(Resident, name, measured(getattr(Resident, name)))
    monkeypatch.setattr(residents_module, "PART_BYTES", 2 * N_FEATURES * 4)
    parts = block()

    assert_array_equal(parts.counts, whole.counts)
    assert_array_equal(parts.features, whole.features)
    assert (parts.active is None) == (whole.active is None)
    if parts.active is not None:
        assert_array_equal(parts.active, whole.active)
    assert_allclose(parts.values, whole.values, rtol=1e-5, atol=1e-6)
    assert heights == ([2, 2, 1] if dictionary.k or not spec.features else [])
