"""Parts of the model: up to a site, or from a site on, where what comes before runs once for every edit of a batch."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steer_server.dictionary.site import Site
from trainer.model import device, hook_at, site_hook
from trainer.structure import Place, decoder_layers, main_tensor, place

_ORDER = ("attn_z", "attn_out", "mlp_act", "mlp_out", "resid_post")


def depth(site: Site) -> tuple[int, int]:
    """Sites of greater depth are computed later."""
    return site.layer, _ORDER.index(site.stream)


class Rest:
    """Of a batch of token sequences, padded on the right, with the earlier layers' outcome kept.

    Only what follows a sequence's last token is padding, which no position of it sees.
    """

    def __init__(
        self,
        model: nn.Module,
        site: Site,
        tokens: Int[Tensor, "sequences positions"],
        lengths: Int[Tensor, " sequences"],
    ) -> None:
        self._model = model
        self._tokens = tokens.long().to(device())
        self._layers = decoder_layers(model)
        self._where = place(model, site)
        self._is_stream = site.stream == "resid_post"
        # A sublayer's own layer must run again.
        self._skipped = site.layer + 1 if self._is_stream else site.layer
        self._last, self._column = torch.unique(lengths.to(device()) - 1, return_inverse=True)
        self._seen: list[Any] = []
        x: list[Tensor] = []
        with torch.no_grad(), hook_at(self._where, x.append), self._recorded():
            logits = self._run(self._tokens)
        self.x: Float[Tensor, "sequences positions d_model"] = x[0].float()
        unedited = self._next(logits, torch.arange(len(tokens))).log_softmax(dim=-1)
        self.unedited: Float[Tensor, "sequences vocabulary"] = unedited
        """Log-probabilities of the model as it is."""

    def log_probabilities(
        self, x: Float[Tensor, "rows positions d_model"], sequences: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Of the token after each sequence's last, when the site has `x`; `sequences` says whose each row is.

        Differentiable in `x`.
        """
        return self.logits(x, sequences).log_softmax(dim=-1)

    def logits(
        self, x: Float[Tensor, "rows positions d_model"], sequences: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """As `log_probabilities`, before they are normalised."""
        with self._holding(x, sequences):
            return self._next(self._run(self._tokens[sequences]), sequences)

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
            self._run(self._tokens[sequences])
        return found[0].float()

    def _run(self, tokens: Tensor) -> Tensor:
        return self._model(input_ids=tokens, use_cache=False, logits_to_keep=self._last).logits

    def _next(self, logits: Tensor, sequences: Tensor) -> Tensor:
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, self._column[sequences]].float()

    @contextmanager
    def _holding(self, x: Tensor, sequences: Tensor) -> Iterator[None]:
        """The site has `x`, and what comes before it does not run."""
        x = x.to(device(), next(self._layers.parameters()).dtype)
        at_site = nullcontext() if self._is_stream else hook_at(self._where, lambda _: x)
        with self._skipping(x if self._is_stream else None, sequences), at_site:
            yield

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keeps what the last skipped layer returns."""
        if not self._skipped:
            yield
            return
        layer = self._layers[self._skipped - 1]
        handle = layer.register_forward_hook(lambda module, args, out: self._seen.append(out))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _skipping(self, x: Tensor | None, sequences: Tensor) -> Iterator[None]:
        """The skipped layers return at once what the last of them did, or `x`."""
        own = list(self._layers[: self._skipped])
        if own:
            (seen,) = self._seen
            told = main_tensor(seen)[sequences] if x is None else x
            out = told if isinstance(seen, Tensor) else (told, *seen[1:])
            for number, layer in enumerate(own):
                self._layers[number] = _Returns(layer, out)
        try:
            yield
        finally:
            for number, layer in enumerate(own):
                self._layers[number] = layer


def read_until(model: nn.Module, sites: Sequence[Site], contexts: Tensor) -> list[Tensor]:
    """As `trainer.model.read_sites`, of a whole model of which nothing after the last site's layer runs."""
    seen: list[list[Tensor]] = [[] for _ in sites]
    with ExitStack() as hooks, torch.inference_mode():
        for site, found in zip(sites, seen, strict=True):
            hooks.enter_context(site_hook(model, site, found.append))
        with _until(_end(model, max(site.layer for site in sites))):
            model(input_ids=contexts.long().to(device()), use_cache=False)
    return [x for (x,) in seen]


class _Returns(nn.Module):
    """In the place of a layer: the same output whatever comes, and the layer's attributes."""

    def __init__(self, layer: nn.Module, out: Any) -> None:
        super().__init__()
        # Not as a child: a model counts and moves its children.
        self._own = (layer, out)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._own[1]

    def __getattr__(self, name: str) -> Any:
        # Some models ask a layer for the kind of its attention.
        return getattr(self.__dict__["_own"][0], name)


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
