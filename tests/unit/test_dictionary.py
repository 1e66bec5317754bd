"""Laws of the arithmetic, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from steer_server.dictionary.dictionary import Activation, Dictionary
from steer_server.dictionary.edits import (
    Ablate,
    Add,
    AddRelative,
    Clamp,
    Edit,
    Limit,
    Patch,
    Scale,
    edit_delta,
)
from steer_server.dictionary.site import Site
from steer_server.errors import ConflictingEdits, InvalidRequest, UnknownFeature
from tests.unit.strategies import N_FEATURES, dictionaries, edit_sets, normal, seeds, xs


def by_definition(dictionary: Dictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    """f and x_hat, written out as in the docstring."""
    s, c = dictionary.input_scale, dictionary.b_dec if dictionary.center_input else 0.0
    f = (s * x - c) @ dictionary.W_enc + dictionary.b_enc
    match dictionary.activation:
        case Activation.RELU:
            f = f.clamp(min=0)
        case Activation.JUMP_RELU:
            f = f * (f > dictionary.threshold)
        case Activation.TOP_K:
            for row in f:
                order = row.argsort(descending=True)
                row[order[dictionary.k :]] = 0
            f = f.clamp(min=0)
    return f, (f @ dictionary.W_dec + dictionary.b_dec) / s


@given(seeds, xs)
def test_a_gated_dictionary_is_the_paper_s_formula(seed: int, x: Tensor) -> None:
    W, b_gate = normal(seed, 8, N_FEATURES), normal(seed + 1, N_FEATURES)
    r_mag, b_mag = normal(seed + 2, N_FEATURES), normal(seed + 3, N_FEATURES)
    W_dec, b_dec = normal(seed + 4, N_FEATURES, 8), normal(seed + 5, 8)

    y = (x - b_dec) @ W
    f = (y + b_gate > 0) * (r_mag.exp() * y + b_mag).clamp(min=0)

    assert_close(Dictionary.gated(W, b_gate, r_mag, b_mag, W_dec, b_dec).encode(x), f)


@given(dictionaries(), xs)
def test_encode_and_decode_follow_the_definition(dictionary: Dictionary, x: Tensor) -> None:
    f, x_hat = by_definition(dictionary, x)

    assert_close(dictionary.encode(x), f)
    assert_close(dictionary.decode(f), x_hat)
    assert_close(dictionary.encode_features(x, [3, 1]), f[:, [3, 1]])


def wanted(edit: Edit, f: Tensor, norms: Tensor) -> Tensor:
    """The activations that the edit asks for, from its docstring; `norms` is |x| over that of the decoder row."""
    match edit:
        case Ablate():
            return torch.zeros_like(f)
        case Clamp(_, value):
            return torch.full_like(f, value)
        case Scale(_, factor):
            return f * factor
        case Add(_, value):
            return f + value
        case AddRelative(_, share):
            return f + share * norms
        case Limit(_, low, high):
            return f.clamp(low, high)
        case Patch(_, values):
            recorded = dict(values)
            return f.new_tensor([recorded.get(i, value) for i, value in enumerate(f.tolist())])


@given(dictionaries(), xs, edit_sets())
def test_an_edit_moves_its_features_and_keeps_the_error_term(
    dictionary: Dictionary, x: Tensor, edits: list[Edit]
) -> None:
    f, x_hat = by_definition(dictionary, x)
    target = f.clone()
    for edit in edits:
        column = target[:, edit.feature]
        row = dictionary.W_dec[edit.feature] / dictionary.input_scale
        target[:, edit.feature] = wanted(edit, column, x.norm(dim=1) / row.norm())

    moved = x + edit_delta(dictionary, x, edits)

    assert_close(moved, dictionary.decode(target) + (x - x_hat))


@given(dictionaries(), xs, edit_sets(), st.randoms(use_true_random=False))
def test_the_delta_of_a_set_is_the_sum_of_its_parts_in_any_order(
    dictionary: Dictionary, x: Tensor, edits: list[Edit], random
) -> None:
    shuffled = random.sample(edits, len(edits))
    parts = sum((edit_delta(dictionary, x, [edit]) for edit in edits), torch.zeros_like(x))

    assert_close(edit_delta(dictionary, x, edits), parts)
    assert_close(edit_delta(dictionary, x, shuffled), parts)


@given(dictionaries(), xs)
def test_no_edits_and_edits_to_the_present_value_change_nothing(
    dictionary: Dictionary, x: Tensor
) -> None:
    f = dictionary.encode(x[:1])
    present = [Clamp(i, float(f[0, i])) for i in range(N_FEATURES)]

    assert not edit_delta(dictionary, x, []).any()
    assert not edit_delta(dictionary, x, [Scale(0, 1.0), Add(1, 0.0)]).any()
    assert_close(edit_delta(dictionary, x[:1], present), torch.zeros_like(x[:1]))


@given(xs)
def test_ablating_an_inactive_feature_changes_nothing(x: Tensor) -> None:
    rows = torch.nn.functional.normalize(normal(1, N_FEATURES, 8), dim=1)
    silent = Dictionary.tied(rows, torch.full((N_FEATURES,), -1e6, dtype=x.dtype))

    assert not edit_delta(silent, x, [Ablate(i) for i in range(N_FEATURES)]).any()


@given(xs)
def test_ablating_a_direction_projects_it_out(x: Tensor) -> None:
    vectors = normal(2, 3, 8)
    dictionary = Dictionary.directions(vectors)

    moved = x + edit_delta(dictionary, x, [Ablate(1)])

    assert_close(moved @ vectors[1], torch.zeros(len(x), dtype=x.dtype), atol=1e-9, rtol=0)
    assert_close(
        dictionary.encode_features(x, [1])[:, 0], x @ vectors[1] / vectors[1].square().sum()
    )


@pytest.mark.parametrize(
    ("edits", "error", "field"),
    [
        ([Ablate(N_FEATURES)], UnknownFeature, "edits[0].feature"),
        ([Ablate(0), Ablate(-1)], UnknownFeature, "edits[1].feature"),
        ([Ablate(2), Clamp(2, 1.0)], ConflictingEdits, "edits[1].feature"),
    ],
)
def test_edits_that_make_no_sense_are_refused(
    edits: list[Edit], error: type[InvalidRequest], field: str
) -> None:
    dictionary = Dictionary.directions(normal(2, N_FEATURES, 8))

    with pytest.raises(error) as caught:
        edit_delta(dictionary, normal(0, 2, 8), edits)
    assert caught.value.field == field


def test_a_relative_edit_has_the_length_it_names() -> None:
    dictionary = Dictionary.directions(normal(2, N_FEATURES, 8))
    x = normal(3, 4, 8)

    delta = edit_delta(dictionary, x, [AddRelative(4, 0.5)])

    assert_close(delta.norm(dim=1), 0.5 * x.norm(dim=1))


def test_a_site_is_a_stream_and_a_layer() -> None:
    assert str(Site.parse("resid_post.12")) == "resid_post.12"
    for text in ("resid_post", "resid_post.01", "resid_post.-1", "blocks.3", "resid_post.1 "):
        with pytest.raises(InvalidRequest, match=r"resid_post\.12"):
            Site.parse(text)
