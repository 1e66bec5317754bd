"""The trainer's kernels against the products at full width: through Triton's interpreter, and on a GPU where there is one.

Most factors are small whole numbers: sums are then exact in any order, in bfloat16 too, and must be equal to the bit.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.unit import kernel_runs
from tests.unit.kernel_runs import Run, whole
from tests.unit.test_trainer_architectures import F, case, hyper, one
from trainer.active import Dense
from trainer.architectures import ARCHITECTURES

MEMBERS = 2


def entries(tokens: int, features: int) -> tuple[Tensor, Tensor]:
    """Every kind of row and column: empty, full, and in between; a member that ends early."""
    generator = torch.Generator().manual_seed(features)
    mask = torch.rand(MEMBERS, tokens, features, generator=generator) < 0.2
    mask[:, :, 3] = mask[:, 1] = True
    mask[:, :, 5] = mask[:, 2] = False
    mask[0, tokens // 2 :] = False
    return mask, whole(generator, MEMBERS, tokens, features)


def factors(tokens: int, features: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(d)
    return whole(generator, MEMBERS, features, d), whole(generator, MEMBERS, tokens, d)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize(
    ("tokens", "features", "d", "precision"),
    [(4, 36, 7, "float32"), (36, 6, 1, "float32"), (5, 9, 150, "bfloat16")],
)
def test_products_over_active_features_are_those_at_full_width(
    run: Run, tokens: int, features: int, d: int, precision: str
) -> None:
    mask, values = entries(tokens, features)
    W, g = factors(tokens, features, d)

    got = run(kernel_runs.products, mask, values, W, g, mask.numel(), precision)

    dense = Dense(torch.where(mask, values, 0.0), mask)
    assert_same(got, kernel_runs.everything(dense, W, g))


def test_a_slice_of_features_and_a_batch_for_all_members_are_taken_in_place(run: Run) -> None:
    mask, values = (part[:, :, 2:8] for part in entries(5, 12))
    W, g = factors(5, 12, 4)
    W, g = W[:, 2:8], g[:1].expand(MEMBERS, -1, -1)

    got = run(kernel_runs.products, mask, values, W, g, mask.numel(), "bfloat16")

    dense = Dense(torch.where(mask, values, 0.0), mask)
    assert_same(got, kernel_runs.everything(dense, W, g))


def test_rows_longer_than_a_block_are_compressed_whole(run: Run) -> None:
    mask = torch.zeros(1, 2, 2500, dtype=torch.bool)
    mask[0, 0, ::300] = mask[0, 1, [0, 1023, 1024, 2499]] = True
    values = torch.arange(5000.0).view(1, 2, 2500)

    key, row, entries = run(kernel_runs.compressed, mask, values, 20)

    assert torch.equal(key[:13].long(), mask[0].nonzero()[:, 1])
    assert torch.equal(row[:13].long(), mask[0].nonzero()[:, 0])
    assert torch.equal(entries[:13], values[mask])
    assert (key[13:] == 2500).all()


def test_where_nothing_is_active_all_is_zero(run: Run) -> None:
    mask = torch.zeros(MEMBERS, 4, 6, dtype=torch.bool)
    W, g = factors(4, 6, 3)

    got = run(kernel_runs.products, mask, torch.full(mask.shape, torch.nan), W, g, 0, "float32")

    for name, value in got.items():
        assert not value.any(), name


def test_entries_without_room_are_not_lost_unseen(run: Run) -> None:
    mask, values = entries(5, 9)
    W, g = factors(5, 9, 2)
    count = int(mask.count_nonzero())

    fits = run(kernel_runs.products, mask, values, W, g, count, "float32")
    full = run(kernel_runs.products, mask, values, W, g, count - 1, "float32")

    assert fits["decode"].isfinite().all()
    rows = full["decode"].isnan().all(dim=2)
    assert rows.sum() >= mask.any(dim=2).sum() - 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_equal_inputs_give_equal_bits() -> None:
    """Programs that run side by side must not race; the interpreter runs one at a time."""
    mask, _ = entries(4096, 200)
    generator = torch.Generator().manual_seed(0)
    shapes = mask.shape, (MEMBERS, 200, 300), (MEMBERS, 4096, 300)
    values, W, g = (torch.randn(shape, generator=generator) for shape in shapes)

    first, second = (
        kernel_runs.products("cuda", mask, values, W, g, mask.numel(), "float32") for _ in range(2)
    )

    assert_same(first, second)


# Interpreted, a step takes seconds: one with prefixes and AuxK, and one with two kinds of entries.
STEPS = [
    name if name in ("matryoshka", "gated") else pytest.param(name, marks=pytest.mark.nightly)
    for name in ARCHITECTURES
]


@pytest.mark.parametrize("name", STEPS)
def test_a_step_with_the_kernels_is_the_same_step(run: Run, name: str) -> None:
    p, x = case(name, shift=-0.5)
    p, x = {key: value[:1].float() for key, value in p.items()}, x[:8].float()
    h = one(hyper(name))
    h = replace(h, alpha=h.alpha.float(), aux_k=4, dead=torch.arange(F)[None] < 12)
    outcome, gradients = ARCHITECTURES[name].step(p, x, h)

    got = run(kernel_runs.step, name, p, x, h)

    want = outcome._asdict() | gradients
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
