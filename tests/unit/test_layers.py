"""Sites are found by structure, and a structure that is not understood is refused."""

import pytest
import torch
from torch import Tensor, nn

from steer_server.dictionary.site import Site
from steer_server.errors import UnsupportedVllm
from steer_server.vllm_plugin.layers import attach


def fused_norm(hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = hidden_states + residual
    return total / total.norm(), total


class LikeLlama(nn.Module):
    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states, residual = fused_norm(hidden_states, residual)
        return hidden_states, residual


class LikeStableLm(nn.Module):
    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = hidden_states
        return residual + hidden_states, residual


class LikeCohere(nn.Module):
    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states, residual = fused_norm(hidden_states, residual)
        hidden_states = hidden_states + residual
        return hidden_states, residual


class LikeGpt2(nn.Module):
    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return hidden_states + residual


def model_of(layer: type[nn.Module], count: int = 3) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([layer() for _ in range(count)])
    return model


def call(layer: type[nn.Module]) -> list[tuple[Tensor, Tensor | None, int]]:
    seen: list[tuple[Tensor, Tensor | None, int]] = []
    model = model_of(layer)
    attach(model, [Site("resid_post", 1)], 3, lambda *args: seen.append(args))
    for module in model.layers:  # type: ignore[union-attr]
        module(torch.ones(2, 4), torch.ones(2, 4))
    return seen


def test_a_pair_of_addends_and_a_whole_stream_are_understood() -> None:
    (pair,), (whole,) = call(LikeLlama), call(LikeGpt2)

    assert pair[1] is not None
    assert whole[1] is None
    assert torch.equal(whole[0], torch.full((2, 4), 2.0))


@pytest.mark.parametrize("layer", [LikeStableLm, LikeCohere])
def test_a_pair_whose_sum_is_not_the_stream_is_refused(layer: type[nn.Module]) -> None:
    with pytest.raises(UnsupportedVllm, match=layer.__name__):
        call(layer)


@pytest.mark.parametrize(
    ("site", "count", "reason"),
    [
        (Site("mlp_out", 1), 3, "resid_post sites only"),
        (Site("resid_post", 3), 3, r"layers 0\.\.2"),
        (Site("resid_post", 0), 4, "expected 4 decoder layers .* found 3"),
    ],
)
def test_sites_that_the_model_lacks_are_refused(site: Site, count: int, reason: str) -> None:
    with pytest.raises(UnsupportedVllm, match=reason):
        attach(model_of(LikeLlama), [site], count, lambda *_: None)
