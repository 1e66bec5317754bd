"""Sites are found in every family, and are what hooks written by hand for that family see."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from steer_server.dictionary.site import Site
from trainer.errors import BadConfig
from trainer.model import read_sites, site_hook, truncate
from trainer.structure import place

pytestmark = pytest.mark.usefixtures("one_thread")

_SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_GROUPED = _SHAPE | {"num_key_value_heads": 1}
_HEADS = _GROUPED | {"head_dim": 24}
_GEMMA = _HEADS | {"query_pre_attn_scalar": 24, "sliding_window": 8}
_GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 32}
_GPT2 |= {"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_OPT = {"vocab_size": 40, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3}
_OPT |= {"num_attention_heads": 2, "max_position_embeddings": 32, "word_embed_proj_dim": 32}
_BLOOM = {"vocab_size": 40, "hidden_size": 32, "n_layer": 3, "n_head": 2}


class Family(NamedTuple):
    """A configuration, and where its model has what, written by hand."""

    config: type[transformers.PreTrainedConfig]
    options: dict[str, Any]
    z_width: int
    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    into_attention: str = "o_proj"
    into_mlp: str = "down_proj"
    norm: str = "model.norm"
    post: tuple[str, str] | None = None
    """Norms of what attention and MLP return."""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(self.config(**self.options)).eval()
        for weight in model.parameters():
            # Norms and biases are ones and zeros at birth, which would hide a wrong place.
            if weight.ndim == 1:
                weight.data += 0.2 * torch.randn_like(weight)
        return model.requires_grad_(False)


_SANDWICH = ("post_attention_layernorm", "post_feedforward_layernorm")
FAMILIES = {
    "llama": Family(transformers.LlamaConfig, _GROUPED, 32),
    "mistral": Family(transformers.MistralConfig, _HEADS, 48),
    "qwen2": Family(transformers.Qwen2Config, _GROUPED, 32),
    "qwen3": Family(transformers.Qwen3Config, _HEADS, 48),
    "gemma2": Family(transformers.Gemma2Config, _GEMMA, 48, post=_SANDWICH),
    "gemma3": Family(transformers.Gemma3TextConfig, _GEMMA, 48, post=_SANDWICH),
    "olmo2": Family(transformers.Olmo2Config, _GROUPED, 32, post=_SANDWICH),
    "phi": Family(
        transformers.PhiConfig,
        _SHAPE,
        32,
        into_attention="dense",
        into_mlp="fc2",
        norm="model.final_layernorm",
    ),
    "gpt2": Family(
        transformers.GPT2Config,
        _GPT2 | {"n_inner": 48},
        32,
        "transformer.h",
        "attn",
        "mlp",
        "c_proj",
        "c_proj",
        "transformer.ln_f",
    ),
    "gpt_neox": Family(
        transformers.GPTNeoXConfig,
        _SHAPE,
        32,
        "gpt_neox.layers",
        "attention",
        "mlp",
        "dense",
        "dense_4h_to_h",
        "gpt_neox.final_layer_norm",
    ),
}
LAYER = 1
STREAMS = ("resid_post", "mlp_out", "attn_out", "attn_z", "mlp_act")
TOKENS = torch.tensor([[5, 9, 3, 17, 22, 8], [30, 2, 11, 7, 39, 13]])


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(family: Family) -> nn.Module:
    return family.model()


def by_hand(model: nn.Module, family: Family, layer: int) -> dict[str, Tensor]:
    """The sites of a layer, its input and what its norms make of its sublayers' outputs."""
    block = attrgetter(family.layers)(model)[layer]
    attention, mlp = getattr(block, family.attention), getattr(block, family.mlp)
    seen: dict[str, Tensor] = {}

    def first(value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else value[0]

    def taken(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[name] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    def given(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: seen.update({name: first(output).clone()})

    handles = [
        block.register_forward_pre_hook(taken("resid_pre"), with_kwargs=True),
        getattr(attention, family.into_attention).register_forward_pre_hook(
            taken("attn_z"), with_kwargs=True
        ),
        getattr(mlp, family.into_mlp).register_forward_pre_hook(taken("mlp_act"), with_kwargs=True),
        attention.register_forward_hook(given("attn_out")),
        mlp.register_forward_hook(given("mlp_out")),
    ]
    for name, norm in zip(("attn", "mlp"), family.post or (), strict=False):
        handles.append(getattr(block, norm).register_forward_hook(given(f"{name}_added")))
    with torch.inference_mode():
        hidden = model(input_ids=TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    for handle in handles:
        handle.remove()
    return seen | {"resid_post": hidden[layer + 1]}


def test_every_site_is_what_a_hook_written_for_the_family_sees(
    family: Family, model: nn.Module
) -> None:
    expected = by_hand(model, family, LAYER)
    found = read_sites(model, [Site(stream, LAYER) for stream in STREAMS], TOKENS)

    for stream, x in zip(STREAMS, found, strict=True):
        assert torch.equal(x, expected[stream]), stream
    assert found[STREAMS.index("attn_z")].shape == (2, 6, family.z_width)
    assert found[STREAMS.index("mlp_act")].shape == (2, 6, 48)


def test_the_sublayers_outputs_through_their_norms_make_the_residual_stream(
    family: Family, model: nn.Module
) -> None:
    expected = by_hand(model, family, LAYER)
    sites = [Site("attn_out", LAYER), Site("mlp_out", LAYER), Site("resid_post", LAYER)]
    attn, mlp, resid_post = read_sites(model, sites, TOKENS)
    if family.post:
        attn, mlp = expected["attn_added"], expected["mlp_added"]
        block = attrgetter(family.layers)(model)[LAYER]
        for site, norm in zip(sites, family.post, strict=False):
            assert place(model, site).to_stream == (getattr(block, norm),)

    torch.testing.assert_close(expected["resid_pre"] + attn + mlp, resid_post)


def test_the_last_layers_output_is_what_the_final_norm_takes(
    family: Family, model: nn.Module
) -> None:
    (x,) = read_sites(model, [Site("resid_post", 2)], TOKENS)
    with torch.inference_mode():
        hidden = model(input_ids=TOKENS, output_hidden_states=True).hidden_states[-1]

    assert torch.equal(attrgetter(family.norm)(model)(x), hidden)


def test_what_replaces_a_projections_input_goes_through_it(
    family: Family, model: nn.Module
) -> None:
    site, out = Site("mlp_act", LAYER), Site("mlp_out", LAYER)
    (x,) = read_sites(model, [site], TOKENS)
    projection = getattr(
        getattr(attrgetter(family.layers)(model)[LAYER], family.mlp), family.into_mlp
    )
    with site_hook(model, site, lambda x: -2 * x):
        (changed,) = read_sites(model, [out], TOKENS)

    torch.testing.assert_close(changed, projection(-2 * x))


def test_the_truncated_model_gives_what_the_full_one_gives(
    family: Family, model: nn.Module
) -> None:
    sites = [Site(stream, LAYER) for stream in STREAMS] + [Site("mlp_act", 0)]
    cut = truncate(family.model(), sites)

    found, expected = read_sites(cut, sites, TOKENS), read_sites(model, sites, TOKENS)

    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("config", "options", "site", "message"),
    [
        (
            transformers.OPTConfig,
            _OPT,
            "mlp_out.1",
            "OPTDecoderLayer should have one child that is its MLP, found fc1, fc2 among self_attn",
        ),
        (
            transformers.BloomConfig,
            _BLOOM,
            "attn_out.1",
            "BloomAttention takes 2 tensors of the shape that it returns",
        ),
        (
            transformers.Qwen3MoeConfig,
            _HEADS | _EXPERTS,
            "mlp_act.1",
            "no linear module of Qwen3MoeSparseMoeBlock gives all that it returns",
        ),
        (transformers.LlamaConfig, _GROUPED, "attn_z.3", r"the model has layers 0\.\.2"),
    ],
)
def test_what_a_family_does_not_have_is_refused_by_name(
    config: type[transformers.PreTrainedConfig], options: dict[str, Any], site: str, message: str
) -> None:
    model = AutoModelForCausalLM.from_config(config(**options)).eval()

    with pytest.raises(BadConfig, match=message):
        truncate(model, [Site.parse(site)])


def test_a_layer_that_keeps_the_stream_elsewhere_is_refused() -> None:
    model = FAMILIES["llama"].model()
    layers = attrgetter("model.layers")(model)
    layers[2].register_forward_pre_hook(lambda _module, args: (args[0] * 2, *args[1:]))

    with pytest.raises(BadConfig, match="returns something else than the next layer takes"):
        truncate(model, [Site.parse("resid_post.1")])


def test_the_attention_of_layers_without_an_mlp_module_is_found() -> None:
    model = AutoModelForCausalLM.from_config(transformers.OPTConfig(**_OPT)).eval()

    attention = attrgetter("model.decoder.layers")(model)[1].self_attn
    assert place(model, Site.parse("attn_out.1")).module is attention
    assert place(model, Site.parse("attn_z.1")).module is attention.out_proj


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(BadConfig, match="Linear should have one list of decoder layers, it has 0"):
        place(nn.Linear(2, 2), Site.parse("resid_post.0"))
