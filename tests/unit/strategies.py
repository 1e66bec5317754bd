"""Random dictionaries, activations and edits."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from steer_server.dictionary.dictionary import Activation, Dictionary
from steer_server.dictionary.edits import Ablate, Add, AddRelative, Clamp, Edit, Scale

D_MODEL, N_FEATURES = 8, 12
seeds = st.integers(0, 2**31 - 1)
numbers = st.floats(-5, 5, allow_nan=False, width=32)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def dictionaries(draw: st.DrawFn) -> Dictionary:
    seed = draw(seeds)
    W_dec, b_enc = normal(seed, N_FEATURES, D_MODEL), normal(seed + 1, N_FEATURES)
    if draw(st.booleans()):
        return Dictionary.tied(torch.nn.functional.normalize(W_dec, dim=1), b_enc)
    return Dictionary(
        normal(seed + 2, D_MODEL, N_FEATURES),
        b_enc,
        W_dec,
        normal(seed + 3, D_MODEL),
        draw(st.sampled_from(list(Activation))),
        draw(st.floats(0.1, 3.0)),
        draw(st.booleans()),
    )


def edits(feature: int) -> st.SearchStrategy[Edit]:
    return st.one_of(
        st.just(Ablate(feature)),
        numbers.map(lambda value: Clamp(feature, value)),
        numbers.map(lambda value: Scale(feature, value)),
        numbers.map(lambda value: Add(feature, value)),
        numbers.map(lambda value: AddRelative(feature, value)),
    )


@st.composite
def edit_sets(draw: st.DrawFn) -> list[Edit]:
    chosen = draw(st.sets(st.integers(0, N_FEATURES - 1), max_size=6))
    return [draw(edits(feature)) for feature in sorted(chosen)]


xs = seeds.map(lambda seed: normal(seed, 5, D_MODEL))
