"""The kernel of the strongest features against float64: on CPU through Triton's interpreter, and on a GPU where there is one.

Activations are exact in any order of summation, because x and the encoders are small whole numbers; so no threshold,
condition or tie hangs on rounding.
"""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steer_server.vllm_plugin.encode_kernel import encode_topk_torch
from tests.unit import kernel_runs
from tests.unit.kernel_runs import Run, some, whole

ROWS = 6
NONE, ALL = -math.inf, math.inf


Tables = tuple[Tensor, Tensor, Tensor]


def encode_case(
    n_features: int, threshold: list[float], rows: int = 3, d_model: int = 40
) -> tuple[Tensor, Tables]:
    g = torch.Generator().manual_seed(n_features)
    tables = (
        whole(g, n_features, d_model),
        whole(g, n_features),
        some(g, threshold, n_features),
    )
    return whole(g, rows, d_model), tables


def encode_topk_reference(x: Tensor, tables: Tables, k: int, above: float = 0.0) -> Tables:
    """What `encode_topk` should return, in float64 and row by row."""
    encoder, bias, threshold = (table.double() for table in tables)
    z = x.double() @ encoder.T + bias
    fires = z > threshold
    features = torch.full((len(x), k), -1, dtype=torch.int32)
    values = torch.zeros(len(x), k)
    for row, f in enumerate(torch.where(fires, z, 0.0)):
        found = sorted((-abs(v), i) for i, v in enumerate(f.tolist()) if abs(v) > above)[:k]
        for place, (_, index) in enumerate(found):
            features[row, place], values[row, place] = index, f[index]
    return features, values, fires.sum(1, dtype=torch.int32)


RELU, IDENTITY, JUMP = [0.0], [NONE], [0.0, 10.0, 35.5]


@pytest.mark.parametrize("n_features", [77, 4608])
@pytest.mark.parametrize(
    ("k", "threshold"), [(1, RELU), (5, IDENTITY), (32, JUMP), (128, IDENTITY)]
)
def test_the_strongest_features_are_the_reference_in_float64(
    run: Run, n_features: int, k: int, threshold: list[float]
) -> None:
    x, tables = encode_case(n_features, threshold)

    got = run(partial(kernel_runs.encode, chunks=3), x, tables, k)

    for mine, want in zip(got, encode_topk_reference(x, tables, k), strict=True):
        assert torch.equal(mine, want)


@pytest.mark.parametrize("threshold", [RELU, IDENTITY, JUMP])
def test_torch_finds_the_same_strongest_features(threshold: list[float]) -> None:
    x, tables = encode_case(300, threshold)
    rows = torch.tensor([2, -1, 0], dtype=torch.int32)

    got = encode_topk_torch(x, *tables, 128, 20.0, rows=rows)

    want = encode_topk_reference(x[rows.clamp(min=0)], tables, 128, above=20.0)
    for mine, theirs, padding in zip(got, want, (-1, 0, 0), strict=True):
        theirs[1] = padding
        assert torch.equal(mine, theirs)


def test_equal_activations_come_by_feature_index(run: Run) -> None:
    x, (encoder, bias, threshold) = encode_case(200, IDENTITY)
    tables = (encoder[:1].expand_as(encoder).contiguous(), bias * 0 + 1000, threshold)

    features, _, _ = run(partial(kernel_runs.encode, chunks=2), x, tables, 5)

    assert features.tolist() == [[0, 1, 2, 3, 4]] * len(x)


def test_where_too_few_are_strong_enough_the_rest_is_missing(run: Run) -> None:
    x, tables = encode_case(77, RELU)
    want = encode_topk_reference(x, tables, 32, above=30.0)

    features, values, active = run(partial(kernel_runs.encode, above=30.0), x, tables, 32)

    assert (want[0] == -1).any()
    assert torch.equal(features, want[0])
    assert torch.equal(values, want[1])
    assert torch.equal(active, want[2])
    assert (active > (features >= 0).sum(1)).any()


def test_rows_are_picked_in_place_and_padding_has_no_features(run: Run) -> None:
    buffer, tables = encode_case(77, IDENTITY, rows=40)
    x = torch.nn.functional.pad(buffer, (0, 3), value=math.nan)[:, :40]
    x[5] = math.nan
    rows = torch.tensor([39, -1, 0, 7, -1], dtype=torch.int32)

    features, values, active = run(partial(kernel_runs.encode, rows=rows), x, tables, 4)

    want = encode_topk_reference(buffer[rows[[0, 2, 3]]], tables, 4)
    assert torch.equal(features[[0, 2, 3]], want[0])
    assert torch.equal(values[[0, 2, 3]], want[1])
    assert features[[1, 4]].eq(-1).all()
    assert active.tolist() == [77, 0, 77, 77, 0]


def test_many_rows_go_in_larger_blocks(run: Run) -> None:
    x, tables = encode_case(130, JUMP, rows=70)

    got = run(kernel_runs.encode, x, tables, 8)

    for mine, want in zip(got, encode_topk_reference(x, tables, 8), strict=True):
        assert torch.equal(mine, want)


def test_a_row_of_nan_has_no_features_and_spoils_no_other(run: Run) -> None:
    x, tables = encode_case(77, IDENTITY)
    want = encode_topk_reference(x, tables, 4)
    x[1] = math.nan

    features, values, active = run(kernel_runs.encode, x, tables, 4)

    assert features[1].tolist() == [-1] * 4
    assert active.tolist() == [77, 0, 77]
    assert torch.equal(features[[0, 2]], want[0][[0, 2]])
    assert torch.equal(values[[0, 2]], want[1][[0, 2]])


def test_bfloat16_inputs_are_encoded_in_float32(run: Run) -> None:
    g = torch.Generator().manual_seed(1)
    x, encoder = (torch.randn(n, 64, generator=g).to(torch.bfloat16) for n in (3, 77))
    tables = (encoder, torch.zeros(77), torch.zeros(77))

    _, values, _ = run(kernel_runs.encode, x, tables, 5)

    torch.testing.assert_close(values, encode_topk_reference(x, tables, 5)[1], rtol=1e-5, atol=1e-5)


def test_all_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    with kernel_runs.process(interpret=False) as call:
        sizes = call(kernel_runs.compile_for_cuda, 90, str(tmp_path))

    trainer = {"_compress", "_dot", "_weighted_sum"}
    assert set(sizes) == {"_edit_row", "_encode_chunk", "_merge_chunks"} | trainer
    assert min(sizes.values()) > 0


def test_once_warmed_up_no_read_out_waits_for_the_compiler() -> None:
    with kernel_runs.process(interpret=False) as call:
        warm, serving = call(kernel_runs.compile_while_serving)

    # Few and many rows by few and many features, and the merge of few and many.
    assert len(warm) == 6
    assert serving == warm
