"""The model up to a site, and from one site on to a later one."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steer_server.dictionary.site import Site
from trainer.model import device, hook_at, site_hook
from trainer.paper.rest import Rest
from trainer.structure import Place, place

_ORDER = ("attn_z", "attn_out", "mlp_act", "mlp_out", "resid_post")


def depth(site: Site) -> tuple[int, int]:
    """Sites of greater depth are computed later."""
    return site.layer, _ORDER.index(site.stream)


def read_until(model: nn.Module, sites: Sequence[Site], contexts: Tensor) -> list[Tensor]:
    """As `trainer.model.read_sites`, of a whole model of which nothing after the last site's layer runs."""
    seen: list[list[Tensor]] = [[] for _ in sites]
    with ExitStack() as hooks, torch.inference_mode():
        for site, found in zip(sites, seen, strict=True):
            hooks.enter_context(site_hook(model, site, found.append))
        with _until(_end(model, max(site.layer for site in sites))):
            model(input_ids=contexts.long().to(device()), use_cache=False)
    return [x for (x,) in seen]


class Onward(Rest):
    """A `Rest` that can also be read before the end."""

    def logits(
        self, x: Float[Tensor, "rows positions d_model"], sequences: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """As `log_probabilities`, before they are normalised."""
        with self._holding(x, sequences):
            logits = self._logits(self._tokens[sequences])
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, self._column[sequences]].float()

    def at(
        self,
        later: Site,
        x: Float[Tensor, "rows positions d_model"],
        sequences: Int[Tensor, " rows"],
    ) -> Float[Tensor, "rows positions width"]:
        """What the later site has when this one has `x`; nothing after its layer runs."""
        found: list[Tensor] = []
        # Found first: a model without its earlier layers tells nothing.
        where, end = place(self._model, later), _end(self._model, later.layer)
        with self._holding(x, sequences), hook_at(where, found.append), _until(end):
            self._logits(self._tokens[sequences])
        return found[0].float()

    @contextmanager
    def _holding(self, x: Tensor, sequences: Tensor) -> Iterator[None]:
        x = x.to(device(), next(self._layers.parameters()).dtype)
        at_site = nullcontext() if self._is_stream else hook_at(self._where, lambda _: x)
        with self._skipping(x if self._is_stream else None, sequences), at_site:
            yield


class _Enough(Exception):
    """Raised inside a forward pass of which the rest is not wanted."""


def _end(model: nn.Module, layer: int) -> Place:
    return place(model, Site("resid_post", layer))


@contextmanager
def _until(end: Place) -> Iterator[None]:
    """A forward pass inside ends at this place, once all hooks that were there before have been called."""

    def stop(_: Tensor) -> None:
        raise _Enough

    try:
        with hook_at(end, stop):
            yield
    except _Enough:
        pass
