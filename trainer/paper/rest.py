"""The model from a site on: what comes before runs once for a batch, what comes after runs for every edit of it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steer_server.dictionary.site import Site
from trainer.model import device, hook_at
from trainer.structure import decoder_layers, main_tensor, place


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
            logits = self._logits(self._tokens)
        self.x: Float[Tensor, "sequences positions d_model"] = x[0].float()
        self.unedited: Float[Tensor, "sequences vocabulary"] = self._next(
            logits, torch.arange(len(tokens))
        )

    def log_probabilities(
        self, x: Float[Tensor, "rows positions d_model"], sequences: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Of the token after each sequence's last, when the site has `x`; `sequences` says whose each row is.

        Differentiable in `x`.
        """
        x = x.to(device(), next(self._layers.parameters()).dtype)
        at_site = nullcontext() if self._is_stream else hook_at(self._where, lambda _: x)
        with self._skipping(x if self._is_stream else None, sequences), at_site:
            logits = self._logits(self._tokens[sequences])
        return self._next(logits, sequences)

    def _logits(self, tokens: Tensor) -> Tensor:
        return self._model(input_ids=tokens, use_cache=False, logits_to_keep=self._last).logits

    def _next(self, logits: Tensor, sequences: Tensor) -> Tensor:
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, self._column[sequences]].float().log_softmax(dim=-1)

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
