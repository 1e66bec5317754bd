"""The edit kernel against float64: on CPU through Triton's interpreter, and on a GPU where there is one.

Activations are exact in any order of summation, because x and the encoders are small whole numbers; so no threshold,
condition or tie hangs on rounding.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer_server.errors import UnsupportedVllm
from steer_server.vllm_plugin.edit_kernel import Bank, Lines, Outcome, edit_rows
from tests.unit import kernel_runs
from tests.unit.kernel_runs import UNTOUCHED, EditCase, Edited, Run, some, whole

SLOTS, LINES, ROWS, ENTRIES = 12, 5, 6, 13
NONE, ALL, LARGEST = -math.inf, math.inf, 1e4


def edit_case(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    d_model: int = 37,
    entries: int = ENTRIES,
    residual: bool = True,
    extra_columns: int = 0,
) -> EditCase:
    """Random programs of every kind on `ROWS` rows; the last line is full, line 0 the no-op."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, entries + 1, (LINES,), generator=g, dtype=torch.int32)
    counts[0], counts[-1] = 0, entries
    decoder = torch.randn(SLOTS, d_model, generator=g) * 0.1
    low = some(g, [NONE, NONE, 0.0, 2.0], LINES, entries)

    def slots() -> Tensor:
        return torch.randint(SLOTS, (LINES, entries), generator=g, dtype=torch.int32)

    lines = (
        counts,
        slots(),
        some(g, [0.0, -1.0, 0.75], LINES, entries),
        some(g, [0.0, 1.5, -2.25], LINES, entries),
        some(g, [0.0, 0.0, 0.125], LINES, entries),
        low,
        torch.maximum(low, some(g, [ALL, ALL, 0.0, 5.0], LINES, entries)),
        slots(),
        some(g, [NONE, NONE, 0.0, 3.0], LINES, entries),
        some(g, [ALL, ALL, 0.0625], LINES),
        some(g, [LARGEST, LARGEST, 0.25], LINES),
    )
    return EditCase(
        whole(g, ROWS, d_model).to(dtype),
        whole(g, ROWS, d_model).to(dtype) if residual else None,
        (
            whole(g, SLOTS, d_model),
            whole(g, SLOTS),
            some(g, [0.0, NONE, 4.5], SLOTS),
            decoder,
            decoder.norm(dim=1),
        ),
        lines,
        torch.randint(LINES, (ROWS + 2,), generator=g, dtype=torch.int32),
        torch.randint(4, (ROWS + 2,), generator=g, dtype=torch.int32),
        extra_columns,
    )


def one_edit(
    offset: float,
    gain: float = 0.0,
    when: float = NONE,
    dtype: torch.dtype = torch.float32,
    most: float = ALL,
    refused: float = LARGEST,
) -> EditCase:
    """All rows take one edit, of a feature that decodes to 1 in every column and never encodes to more than 0."""
    case = edit_case(dtype=dtype)
    encoder, bias, threshold, decoder, _ = case.bank
    decoder = torch.ones_like(decoder)
    counts, slot, *_ = case.lines
    table = torch.zeros(LINES, ENTRIES)
    lines = (
        torch.ones_like(counts),
        torch.zeros_like(slot),
        table + gain,
        table + offset,
        table,
        table + NONE,
        table + ALL,
        torch.zeros_like(slot),
        table + when,
        torch.full((LINES,), most),
        torch.full((LINES,), refused),
    )
    never = torch.full_like(threshold, ALL)
    return replace(
        case,
        bank=(encoder, bias, never, decoder, decoder.norm(dim=1)),
        lines=lines,
        row_line=torch.ones_like(case.row_line),
        row_read=torch.full_like(case.row_read, 3),
    )


def edit_rows_reference(case: EditCase) -> Edited:
    """What the kernel should do, in float64 and row by row."""
    n_rows, d_model = case.hidden.shape
    max_rows, entries = case.row_line.shape[0], case.lines[1].shape[1]
    want = Edited(
        case.hidden.clone(),
        torch.full((max_rows, entries), UNTOUCHED, dtype=torch.float64),
        torch.full((max_rows,), UNTOUCHED, dtype=torch.float64),
        torch.full((max_rows,), UNTOUCHED, dtype=torch.float64),
        torch.full((max_rows,), int(UNTOUCHED), dtype=torch.int32),
        torch.full((max_rows, d_model), UNTOUCHED, dtype=torch.float64),
        torch.full((max_rows, d_model), UNTOUCHED, dtype=torch.float64),
        torch.full((n_rows, case.extra_columns), UNTOUCHED, dtype=case.hidden.dtype),
    )
    for row in range(n_rows):
        edit_row_reference(case, want, row)
    return want


def edit_row_reference(case: EditCase, want: Edited, row: int) -> None:
    encoder, bias, threshold, decoder, norm = (table.double() for table in case.bank)
    counts, slots, gain, offset, share, low, high, when_slot, when_above, most, refused = case.lines
    line, read = int(case.row_line[row]), int(case.row_read[row])
    h = case.hidden[row].double()
    r = torch.zeros_like(h) if case.residual is None else case.residual[row].double()
    x = h + r
    z = encoder @ x + bias
    f = torch.where(z > threshold, z, 0.0)
    delta = torch.zeros_like(x)
    for e in range(int(counts[line])):
        slot, at = int(slots[line, e]), (line, e)
        change = gain[at] * f[slot] + offset[at] + share[at] * x.norm() / norm[slot]
        change = change + f[slot].clamp(low[at], high[at]) - f[slot]
        if when_above[at] > NONE and not f[when_slot[at]] > when_above[at]:
            change = torch.zeros(())
        want.change[row, e] = change
        delta += change * decoder[slot]
    if counts[line]:
        want.size[row] = delta.norm()
        if delta.norm() > most[line] * x.norm():
            delta *= most[line] * x.norm() / delta.norm()
        edited = (h + delta).to(case.hidden.dtype)
        applied = bool((delta.norm() <= refused[line] * x.norm()) & edited.isfinite().all())
        want.x_norm[row], want.applied[row] = x.norm(), applied
        if applied:
            want.hidden[row] = edited
    if read & 1:
        want.x_before[row] = x
    if read & 2:
        want.x_after[row] = want.hidden[row].double() + r


def assert_equal(got: Edited, want: Edited) -> None:
    # A sum that differs in its last bits may round to the next number of the dtype.
    close = partial(torch.testing.assert_close, check_dtype=False, equal_nan=True)
    ulp = torch.finfo(got.hidden.dtype).eps
    rounding = {"rtol": max(2e-5, ulp), "atol": max(2e-5, 4 * ulp)}
    close(got.hidden, want.hidden, **rounding)
    close(got.x_after, want.x_after, **rounding)
    close(got.change, want.change, rtol=1e-5, atol=1e-5)
    close(got.x_norm, want.x_norm, rtol=1e-5, atol=1e-5)
    close(got.size, want.size, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.applied, want.applied)
    assert torch.equal(got.x_before.double(), want.x_before)
    assert torch.equal(got.beside, want.beside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(
    seed=st.integers(0, 10**6),
    d_model=st.sampled_from([1, 37, 64, 300]),
    entries=st.sampled_from([1, 5, 8, 13, 64]),
    residual=st.booleans(),
    extra_columns=st.sampled_from([0, 3]),
)
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
def test_edited_rows_are_the_reference_in_float64(
    run: Run,
    dtype: torch.dtype,
    seed: int,
    d_model: int,
    entries: int,
    residual: bool,
    extra_columns: int,
) -> None:
    case = edit_case(seed, dtype, d_model, entries, residual, extra_columns)

    assert_equal(run(kernel_runs.edit, case), edit_rows_reference(case))


def test_the_widest_model_is_edited(run: Run) -> None:
    case = edit_case(d_model=16384, entries=3)

    assert_equal(run(kernel_runs.edit, case), edit_rows_reference(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_rows_are_neither_read_nor_written(run: Run, dtype: torch.dtype) -> None:
    case = edit_case(dtype=dtype)
    padding = torch.tensor([1, 4])
    case.row_line[padding] = case.row_read[padding] = 0
    case.hidden[padding] = math.nan

    got = run(kernel_runs.edit, case)

    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got.hidden[padding].view(bits), case.hidden[padding].view(bits))
    for table in (got.change, got.x_norm, got.size, got.applied, got.x_before, got.x_after):
        assert (table[padding] == UNTOUCHED).all()


def test_a_read_without_edits_only_copies(run: Run) -> None:
    case = edit_case(dtype=torch.bfloat16)
    case.row_line[:] = 0
    case.row_read[:] = 3

    got = run(kernel_runs.edit, case)

    x = case.hidden.float() + case.residual.float()
    assert torch.equal(got.hidden, case.hidden)
    assert torch.equal(got.x_before[:ROWS], x)
    assert torch.equal(got.x_after[:ROWS], x)
    assert (got.applied == UNTOUCHED).all()
    assert (got.x_norm == UNTOUCHED).all()


def test_a_delta_of_far_more_than_x_is_left_out(run: Run) -> None:
    case = one_edit(offset=1e8)

    got = run(kernel_runs.edit, case)

    assert torch.equal(got.hidden, case.hidden)
    assert torch.equal(got.x_after, got.x_before)
    assert (got.applied[:ROWS] == 0).all()
    assert (got.change[:ROWS, 0] == 1e8).all()


def test_a_delta_past_the_most_of_its_line_is_scaled_down_to_it(run: Run) -> None:
    case = one_edit(offset=1e8, most=0.5)
    case.lines[-2][2] = ALL
    case.row_line[1] = 2

    got = run(kernel_runs.edit, case)

    rows = [0, 2, 3, 4, 5]
    moved = (got.x_after[:ROWS] - got.x_before[:ROWS]).norm(dim=1) / got.x_norm[:ROWS]
    torch.testing.assert_close(moved[rows], torch.full((5,), 0.5))
    assert (got.size[:ROWS] > 1e8).all()
    assert got.applied[:ROWS].tolist() == [1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float16, 2e4), (torch.bfloat16, 8e37)])
def test_a_row_that_its_dtype_cannot_hold_is_left_out(
    run: Run, dtype: torch.dtype, offset: float
) -> None:
    case = one_edit(offset, dtype=dtype)
    case.hidden[0] = torch.finfo(dtype).max
    case.residual[0] = 0

    got = run(kernel_runs.edit, case)

    assert torch.equal(got.hidden[0], case.hidden[0])
    assert got.applied[0] == 0


def test_a_nan_in_a_row_stays_in_that_row_and_is_not_edited(run: Run) -> None:
    case = one_edit(offset=1.0)
    case.hidden[2, 5] = math.nan

    got = run(kernel_runs.edit, case)

    assert got.applied[:ROWS].tolist() == [1, 1, 0, 1, 1, 1]
    assert torch.equal(got.hidden[2].view(torch.int32), case.hidden[2].view(torch.int32))
    assert got.hidden[[0, 1, 3, 4, 5]].isfinite().all()


def test_a_condition_that_does_not_hold_leaves_the_row_bit_identical(run: Run) -> None:
    case = one_edit(offset=1.0, when=0.0)
    case.hidden[:, 0] = -0.0

    got = run(kernel_runs.edit, case)

    assert torch.equal(got.hidden.view(torch.int32), case.hidden.view(torch.int32))
    assert (got.change[:ROWS, 0] == 0).all()
    assert (got.applied[:ROWS] == 1).all()


def test_scaling_an_inactive_feature_leaves_the_row_bit_identical(run: Run) -> None:
    case = one_edit(offset=0.0, gain=-1.0)
    case.hidden[:, 0] = -0.0

    got = run(kernel_runs.edit, case)

    assert torch.equal(got.hidden.view(torch.int32), case.hidden.view(torch.int32))


def test_a_decoder_row_of_norm_zero_spoils_nothing(run: Run) -> None:
    case = one_edit(offset=1.0)
    case.bank[4][:] = 0

    got = run(kernel_runs.edit, case)

    assert (got.change[:ROWS, 0] == 1).all()
    assert (got.applied[:ROWS] == 1).all()


def test_bfloat16_rows_round_to_the_nearest_even(run: Run) -> None:
    case = one_edit(offset=2**-8, dtype=torch.bfloat16)
    case.hidden[:] = torch.linspace(-4, 4, case.hidden.numel()).view_as(case.hidden)

    got = run(kernel_runs.edit, case)

    assert torch.equal(got.hidden, (case.hidden.float() + 2**-8).to(torch.bfloat16))


def test_a_row_is_the_same_whatever_its_neighbours_do(run: Run) -> None:
    case = edit_case(seed=3)
    alone = replace(case, row_line=case.row_line.clone(), row_read=case.row_read.clone())
    alone.row_line[1:] = alone.row_read[1:] = 0
    case.row_line[0] = alone.row_line[0] = LINES - 1

    together, single = run(kernel_runs.edit, case), run(kernel_runs.edit, alone)

    assert torch.equal(together.hidden[0], single.hidden[0])
    assert torch.equal(together.change[0], single.change[0])


def test_hidden_states_with_columns_apart_are_refused() -> None:
    case = edit_case(d_model=ROWS)
    tables = Bank(*case.bank), Lines(*case.lines), case.row_line, case.row_read
    out = Outcome(*[torch.zeros(ROWS, ROWS)] * 6)

    with pytest.raises(UnsupportedVllm, match="adjacent columns"):
        edit_rows(case.hidden.T, case.residual, *tables, out)
