"""Random dictionaries, activations and edits."""

import torch
from hypothesis import strategies as st
from torch import Tensor

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
)

D_MODEL, N_FEATURES = 8, 12
seeds = st.integers(0, 2**31 - 1)
# Of a subnormal change the delta may be 0.
numbers = st.floats(-5, 5, allow_nan=False, allow_subnormal=False, width=32)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def dictionaries(draw: st.DrawFn) -> Dictionary:
    return dictionary(draw(seeds), draw(st.sampled_from(ARCHITECTURES)), draw(st.floats(0.1, 3.0)))


ARCHITECTURES = ("tied", "relu", "jump_relu", "top_k", "gated", "identity")


def dictionary(seed: int, architecture: str, scale: float = 1.0) -> Dictionary:
    """Random weights in float64; every second one centres its input."""
    W_dec, b_enc = normal(seed, N_FEATURES, D_MODEL), normal(seed + 1, N_FEATURES)
    W_enc, b_dec = normal(seed + 2, D_MODEL, N_FEATURES), normal(seed + 3, D_MODEL)
    if architecture == "tied":
        return Dictionary.tied(torch.nn.functional.normalize(W_dec, dim=1), b_enc)
    if architecture == "gated":
        r_mag, b_mag = normal(seed + 4, N_FEATURES), normal(seed + 5, N_FEATURES)
        return Dictionary.gated(W_enc, b_enc, r_mag, b_mag, W_dec, b_dec)
    threshold = normal(seed + 6, N_FEATURES).abs() if architecture == "jump_relu" else None
    return Dictionary(
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        Activation(architecture),
        scale,
        bool(seed % 2),
        threshold,
        3 if architecture == "top_k" else 0,
    )


def edits(feature: int) -> st.SearchStrategy[Edit]:
    positions = st.dictionaries(st.integers(0, 9), numbers, min_size=1, max_size=4)
    return st.one_of(
        st.just(Ablate(feature)),
        numbers.map(lambda value: Clamp(feature, value)),
        numbers.map(lambda value: Scale(feature, value)),
        numbers.map(lambda value: Add(feature, value)),
        numbers.map(lambda value: AddRelative(feature, value)),
        st.tuples(numbers, numbers).map(lambda ends: Limit(feature, min(ends), max(ends))),
        numbers.map(lambda value: Limit(feature, high=value)),
        positions.map(lambda values: Patch(feature, tuple(sorted(values.items())))),
    )


@st.composite
def edit_sets(draw: st.DrawFn) -> list[Edit]:
    chosen = draw(st.sets(st.integers(0, N_FEATURES - 1), max_size=6))
    return [draw(edits(feature)) for feature in sorted(chosen)]


xs = seeds.map(lambda seed: normal(seed, 5, D_MODEL))
