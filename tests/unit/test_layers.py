"""Sites are found by structure, their outputs understood by behaviour, and what is neither is refused."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steer_server.dictionary.site import Site
from steer_server.errors import UnsupportedVllm
from steer_server.vllm_plugin.layers import attach

D_MODEL = 4


def norm(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


class Inner(nn.Module):
    """What vLLM's attention looks like from outside."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer_name = name

    def get_kv_cache_spec(self) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Attention(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.attn = Inner(f"model.layers.{index}.self_attn.attn")
        self.o_proj = nn.Linear(D_MODEL, D_MODEL)

    def forward(self, x: Tensor) -> Any:
        return self.o_proj(self.attn(x))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(D_MODEL, D_MODEL)

    def forward(self, x: Tensor) -> Any:
        return self.proj(x)


class Layer(nn.Module):
    """Like Llama: leaves the last addition to the next layer's norm."""

    attention: Callable[[int], nn.Module] = Attention
    feed_forward: Callable[[], nn.Module] = Mlp

    def __init__(self, index: int) -> None:
        super().__init__()
        self.self_attn = type(self).attention(index)
        self.mlp = type(self).feed_forward()

    def forward(self, h: Tensor, r: Tensor | None) -> Any:
        r = h if r is None else h + r
        r = r + self.self_attn(norm(r))
        return self.mlp(norm(r)), r


class LikeCohere(Layer):
    """The first of the pair is the whole stream; nobody reads the second."""

    def forward(self, h: Tensor, r: Tensor | None) -> Any:
        return h + self.mlp(norm(h + self.self_attn(norm(h)))), h


class LikeGpt2(Layer):
    def forward(self, h: Tensor, r: Tensor | None) -> Any:
        return super().forward(h, None)[0] + h


class TransformersOwn(LikeGpt2):
    """A batch dimension of one."""

    def forward(self, h: Tensor, r: Tensor | None) -> Any:
        return super().forward(h if h.ndim == 3 else h.unsqueeze(0), None)


class Toy(nn.Module):
    def __init__(self, layer: Callable[[int], nn.Module], count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vision = nn.ModuleList([Mlp() for _ in range(count)])
        self.layers = nn.ModuleList([layer(index) for index in range(count)])

    def forward(self, x: Tensor) -> Any:
        r = None
        for layer in self.layers:
            output = layer(x, r)
            x, r = output[:2] if isinstance(output, tuple) else (output, None)
        if isinstance(self.layers[0], LikeCohere | LikeGpt2) or r is None:
            return norm(x)
        return norm(x + r)


@dataclass
class Loaded:
    model: nn.Module
    max_rows: int = 64
    ends_here: bool = True
    ranks_agree: bool = True

    @torch.no_grad()
    def run(self, rows: int) -> Tensor:
        return self.model(torch.linspace(1, 2, D_MODEL).repeat(rows, 1)).reshape(rows, -1)

    def replicated(self, x: Tensor) -> bool:
        return self.ranks_agree


def attached(
    layer: Callable[[int], nn.Module],
    *sites: str,
    call: Callable[[Tensor, Tensor | None, int], None] = lambda *_: None,
    **loaded: Any,
) -> Toy:
    model = Toy(layer, 3)
    attach(model, [Site.parse(site) for site in sites], 3, call, Loaded(model, **loaded))
    return model


ALL = ("resid_post.0", "resid_post.2", "mlp_out.1", "attn_out.1")


@pytest.mark.parametrize(
    ("layer", "sum_of_pair"),
    [(Layer, True), (LikeCohere, False), (LikeGpt2, False), (TransformersOwn, False)],
)
def test_x_is_the_sum_of_a_pair_only_where_the_next_layer_reads_the_sum(
    layer: type[Layer], sum_of_pair: bool
) -> None:
    seen: dict[int, tuple[Tensor, Tensor | None]] = {}

    def call(hidden: Tensor, residual: Tensor | None, number: int) -> None:
        seen[number] = (hidden, residual)

    model = attached(layer, *ALL, call=call)
    model(torch.ones(2, D_MODEL))

    assert list(seen) == [0, 3, 2, 1]
    assert [seen[number][1] is not None for number in (0, 1)] == [sum_of_pair] * 2
    assert all(seen[number][1] is None for number in (2, 3))
    assert all(hidden.shape == (2, D_MODEL) for hidden, _ in seen.values())


@pytest.mark.parametrize("layer", [Layer, LikeCohere, LikeGpt2, TransformersOwn])
@pytest.mark.parametrize("site", ALL)
def test_an_edit_in_place_does_what_a_replacing_hook_does(layer: type[Layer], site: str) -> None:
    d = torch.tensor([1.0, -2.0, 0.5, 0.0])
    model = attached(layer, site, call=lambda hidden, *_: hidden.add_(d))
    plain = Toy(layer, 3)
    target = plain.layers[Site.parse(site).layer]
    names = {"attn_out": "self_attn", "mlp_out": "mlp"}
    module = target.get_submodule(names.get(site.partition(".")[0], ""))
    module.register_forward_hook(
        lambda _module, _args, out: (out[0] + d, out[1]) if isinstance(out, tuple) else out + d
    )
    x = torch.ones(2, D_MODEL)

    assert torch.equal(model(x), plain(x))
    assert not torch.equal(model(x), Toy(layer, 3)(x))


def test_probing_leaves_no_hook_and_never_calls_the_site() -> None:
    def never(*_: object) -> None:
        raise AssertionError

    model = attached(Layer, "resid_post.1", call=never)

    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    assert {name for name, count in hooks.items() if count} == {"layers.1"}


class NormsInTheLayer(Layer):
    """Returns the next layer's input already normed, beside the stream."""

    def forward(self, h: Tensor, r: Tensor | None) -> Any:
        r = h if r is None else r
        r = r + self.mlp(norm(h))
        return norm(r), r


class ReadsTheSecond(Layer):
    def forward(self, h: Tensor, r: Tensor | None) -> Any:
        x = h if r is None else r
        return norm(x), x + self.mlp(norm(x))


class Aliased(Layer):
    """Both of the pair are one tensor, and both are read."""

    def forward(self, h: Tensor, r: Tensor | None) -> Any:
        x = self.mlp(norm(h if r is None else h + r))
        return x, x


class Triple(Layer):
    def forward(self, h: Tensor, r: Tensor | None) -> Any:
        return h, h, h


class Widened(Layer):
    def forward(self, h: Tensor, r: Tensor | None) -> Any:
        return torch.stack([h if h.ndim == 2 else h[0]] * 2)


class CopyTaken(Layer):
    """The MLP's output is read from a copy that the MLP made before it returned."""

    def forward(self, h: Tensor, r: Tensor | None) -> Any:
        self.mlp(h)
        return h + 1.0, torch.zeros_like(h)


class InPlaceMlp(Mlp):
    def forward(self, x: Tensor) -> Any:
        return x


class OutputSharesTheStream(Layer):
    """The MLP returns the very tensor that is the residual stream."""

    feed_forward = InPlaceMlp

    def forward(self, h: Tensor, r: Tensor | None) -> Any:
        x = h if r is None else h + r
        return self.mlp(x), x


class TwoTensors(Mlp):
    def forward(self, x: Tensor) -> Any:
        return x, x


class TwoMlpOutputs(Layer):
    feed_forward = TwoTensors

    def forward(self, h: Tensor, r: Tensor | None) -> Any:
        x = h if r is None else h + r
        return sum(self.mlp(x)), x


class ThroughAnArgument(Layer):
    """The MLP returns nothing and writes into a buffer of the layer's."""

    class feed_forward(Mlp):
        def forward(self, x: Tensor) -> Any:
            return None

    def forward(self, h: Tensor, r: Tensor | None) -> Any:
        self.mlp(h)
        return h, torch.zeros_like(h)


class NarrowMlp(Mlp):
    def forward(self, x: Tensor) -> Any:
        return self.proj(x)[:, :2]


class Narrow(LikeGpt2):
    """The MLP's last projection is the layer's own."""

    feed_forward = NarrowMlp

    def forward(self, h: Tensor, r: Tensor | None) -> Any:
        return h + self.mlp(norm(h)).repeat(1, 2)


class Twice(Layer):
    def forward(self, h: Tensor, r: Tensor | None) -> Any:
        x = h if r is None else h + r
        return self.mlp(self.mlp(x)), x


@pytest.mark.parametrize(
    ("layer", "site", "reason"),
    [
        (NormsInTheLayer, "resid_post.1", "reads neither the sum nor the first"),
        (ReadsTheSecond, "resid_post.0", "does not use"),
        (Aliased, "resid_post.1", "cannot be edited in place"),
        (Triple, "resid_post.1", r"returns tuple with \(2, 4\), \(2, 4\), \(2, 4\)"),
        (Widened, "resid_post.1", r"returns Tensor with \(2, 2, 4\)"),
        (CopyTaken, "mlp_out.1", "Mlp returns a tensor that the model does not use"),
        (OutputSharesTheStream, "mlp_out.1", "InPlaceMlp .* cannot be edited in place"),
        (TwoMlpOutputs, "mlp_out.1", r"TwoTensors returns tuple with \(2, 4\), \(2, 4\)"),
        (ThroughAnArgument, "mlp_out.1", "returns NoneType with no tensor"),
        (Narrow, "mlp_out.1", "NarrowMlp returns a tensor that is not as wide"),
        (Twice, "mlp_out.1", "Mlp runs 2 times in a pass"),
    ],
)
def test_behaviour_that_is_not_understood_is_refused_by_name(
    layer: type[Layer], site: str, reason: str
) -> None:
    with pytest.raises(UnsupportedVllm, match=f"site {site}: .*{reason}"):
        attached(layer, site)


class OpenLayer(LikeGpt2):
    """Like OPT: the MLP's linear layers are the layer's own."""

    feed_forward = nn.Identity

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.fc1, self.fc2 = nn.Linear(D_MODEL, D_MODEL), nn.Linear(D_MODEL, D_MODEL)


class TwoMlps(LikeGpt2):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.shared_mlp = Mlp()


class BareAttention(LikeGpt2):
    attention = staticmethod(lambda index: Inner(f"layers.{index}.attn"))


@pytest.mark.parametrize(
    ("layer", "site", "reason"),
    [
        (OpenLayer, "mlp_out.1", "found none among self_attn, mlp, fc1, fc2"),
        (TwoMlps, "mlp_out.1", "found mlp, shared_mlp"),
        (BareAttention, "attn_out.1", "found none"),
        (Layer, "mlp_act.1", "vLLM exposes resid_post, mlp_out, attn_out only"),
        (Layer, "attn_z.1", "vLLM exposes resid_post, mlp_out, attn_out only"),
        (Layer, "resid_post.3", r"layers 0\.\.2"),
        (lambda index: Layer(index + 1), "resid_post.1", "number 0 calls its attention .*layers.1"),
    ],
)
def test_sites_that_the_model_lacks_are_refused(layer: Any, site: str, reason: str) -> None:
    with pytest.raises(UnsupportedVllm, match=reason):
        attached(layer, site)


def test_another_number_of_layers_than_the_config_says_is_refused() -> None:
    model = Toy(Layer, 3)

    with pytest.raises(UnsupportedVllm, match="one list of 4 decoder layers, found 3 in layers"):
        attach(model, [Site.parse("resid_post.0")], 4, lambda *_: None, Loaded(model))


def test_outputs_that_differ_between_tensor_parallel_ranks_are_refused() -> None:
    with pytest.raises(UnsupportedVllm, match="other values on other tensor-parallel ranks"):
        attached(Layer, "mlp_out.1", ranks_agree=False)


def test_tokens_that_see_each_other_cannot_be_probed() -> None:
    class Mixes(LikeGpt2):
        def forward(self, h: Tensor, r: Tensor | None) -> Any:
            return super().forward(h, r) + h.mean(dim=0)

    with pytest.raises(UnsupportedVllm, match="tokens see each other"):
        attached(Mixes, "resid_post.1")


def test_few_rows_at_a_time_suffice() -> None:
    model = attached(Layer, *ALL, max_rows=4)

    assert len(model.layers[0]._forward_hooks) == 1


class Stage(Toy):
    """The first two of three layers, in a pipeline: the pair goes to another process."""

    def __init__(self, layer: Callable[[int], nn.Module], first: int = 0) -> None:
        super().__init__(layer, 3)
        for index in {0, 1, 2} - {first, 1}:
            self.layers[index] = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        output = self.layers[1](*self.layers[0](x, None))
        return torch.cat(output, dim=1)


def test_a_pipeline_stage_attaches_its_own_sites_only() -> None:
    model = Stage(Layer)
    sites = [Site.parse(f"resid_post.{index}") for index in range(3)]
    seen: dict[int, bool] = {}

    def call(hidden: Tensor, residual: Tensor | None, number: int) -> None:
        seen[number] = residual is not None

    owned = attach(model, sites, 3, call, Loaded(model, ends_here=False))
    model(torch.ones(2, D_MODEL))

    assert owned == sites[:2]
    assert seen == {0: True, 1: True}


def test_a_pair_that_only_another_process_reads_is_refused() -> None:
    class Last(Layer):
        pass

    model = Stage(lambda index: (Last if index else Layer)(index))

    with pytest.raises(UnsupportedVllm, match="another pipeline rank reads"):
        attach(
            model, [Site.parse("resid_post.1")], 3, lambda *_: None, Loaded(model, ends_here=False)
        )
