"""Finds where the sites are in a model that vLLM has loaded, and hooks them.

Modules are found by structure and their outputs understood by behaviour (`probe.py`), never by class name.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from steer_server.dictionary.site import SERVED, Site
from steer_server.errors import UnsupportedVllm
from steer_server.vllm_plugin.probe import LoadedModel, Place, is_attention, main_tensor, understand

SiteCall = Callable[[Tensor, Tensor | None, int], None]
"""Called with (hidden, residual, site number), both [tokens, d_model]: x is their sum, or hidden if there is no
residual. It edits x in place in `hidden`."""


def attach(
    model: nn.Module, sites: Sequence[Site], n_layers: int, call: SiteCall, loaded: LoadedModel
) -> list[Site]:
    """Hooks `call` behind each site whose layer is in this process, and returns those sites.

    Runs the model a few times to see what its modules return; nothing of that stays. UnsupportedVllm, before any
    hook is set, if the structure or the behaviour is not understood.
    """
    layers = decoder_layers(model, n_layers)
    places = []
    for number, site in enumerate(sites):
        if site.inner:
            raise UnsupportedVllm(f"site {site}: vLLM exposes {', '.join(SERVED)} only")
        if site.layer >= n_layers:
            raise UnsupportedVllm(f"site {site}: the model has layers 0..{n_layers - 1}")
        if not _elsewhere(layers[site.layer]):
            places.append(_place(layers, number, site, loaded.ends_here))
    for place, addends in zip(places, understand(places, loaded), strict=True):
        place.module.register_forward_hook(_hook(call, place, addends))
    return [place.site for place in places]


def decoder_layers(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The one ModuleList of `n_layers` modules with attention inside, by absolute layer number."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(map(_attentions, module))
    ]
    found = [layers for _, layers in lists if len(layers) == n_layers]
    if len(found) != 1:
        seen = ", ".join(f"{len(layers)} in {name}" for name, layers in lists)
        raise UnsupportedVllm(
            f"{type(model).__name__}: expected one list of {n_layers} decoder layers, found {seen or 'none'}"
        )
    for index, layer in enumerate(found[0]):
        for attention in _attentions(layer):
            _check_number(layer, index, getattr(attention, "layer_name", None))
    return found[0]


def _place(layers: nn.ModuleList, number: int, site: Site, ends_here: bool) -> Place:
    layer = layers[site.layer]
    module = layer
    if site.stream != "resid_post":
        attention = site.stream == "attn_out"
        module = _child(layer, site, _attention_children(layer) if attention else _mlps(layer))
    following = layers[site.layer + 1] if site.layer + 1 < len(layers) else None
    witness: nn.Module | None = layer
    if following is not None and _elsewhere(following) and not ends_here:
        # Whoever takes this layer's pair is in another process: believe a layer of the same class.
        before = layers[site.layer - 1] if site.layer else None
        witness = before if type(before) is type(layer) else None
    return Place(number, site, module, layer, witness)


def _child(layer: nn.Module, site: Site, found: Sequence[tuple[str, nn.Module]]) -> nn.Module:
    if len(found) != 1:
        names = ", ".join(name for name, _ in found)
        raise UnsupportedVllm(
            f"site {site}: {type(layer).__name__} should have one such module, found {names or 'none'} "
            f"among {', '.join(name for name, _ in layer.named_children())}"
        )
    return found[0][1]


def _attention_children(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children that wrap an attention, and with it the output projection."""
    return [
        (name, child)
        for name, child in layer.named_children()
        if not is_attention(child) and _attentions(child)
    ]


def _mlps(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children without attention that hold linear layers."""
    return [
        (name, child)
        for name, child in layer.named_children()
        if not _attentions(child)
        and any(_is_linear(part) for part in child.modules() if part is not child)
    ]


def _attentions(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if is_attention(part)]


def _is_linear(module: nn.Module) -> bool:
    # vLLM's linear layers have a quantisation method; their weights may be packed away.
    return isinstance(module, nn.Linear) or hasattr(module, "quant_method")


def _elsewhere(module: nn.Module) -> bool:
    """Whether another rank of a pipeline holds the layer: vLLM's PPMissingLayer is an identity."""
    return isinstance(module, nn.Identity)


def _check_number(layer: nn.Module, index: int, name: str | None) -> None:
    if name is not None and str(index) not in name.split("."):
        raise UnsupportedVllm(f"{type(layer).__name__} number {index} calls its attention {name}")


def _hook(call: SiteCall, place: Place, addends: bool) -> Callable[..., None]:
    number = place.number

    def after(module: nn.Module, args: object, output: object) -> None:
        # torch.compile traces this, so it stays with what dynamo knows.
        residual = output[1] if addends else None  # type: ignore[index]
        hidden = main_tensor(output)
        if hidden.ndim == 3:
            # transformers' own models carry a batch of one.
            hidden = hidden.squeeze(0)
            residual = None if residual is None else residual.squeeze(0)
        call(hidden, residual, number)

    return after
