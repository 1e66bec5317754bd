"""Where in a model a dictionary lives."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from steer_server.errors import InvalidRequest

Stream = Literal["resid_post", "mlp_out", "attn_out", "attn_z", "mlp_act"]
SERVED: tuple[Stream, ...] = ("resid_post", "mlp_out", "attn_out")
"""Streams as wide as the model, which vLLM exposes."""

_PATTERN = re.compile(rf"({'|'.join(get_args(Stream))})\.(0|[1-9][0-9]*)")


@dataclass(frozen=True, order=True)
class Site:
    """A tensor of one decoder layer: its output (`resid_post`), that of its MLP or attention, or what goes into their last
    projections: the heads' outputs side by side (`attn_z`), the MLP's hidden activations (`mlp_act`)."""

    stream: Stream
    layer: int

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site written as `stream.layer`, such as `resid_post.12`."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise InvalidRequest(
                f"site {text!r} is not one of {', '.join(get_args(Stream))} and a layer number "
                "joined by a dot, such as resid_post.12",
                field="site",
            )
        return cls(match[1], int(match[2]))  # type: ignore[arg-type]

    @property
    def inner(self) -> bool:
        """Whether it is inside a sublayer: of a width of its own, and for training and evaluation only."""
        return self.stream not in SERVED

    def __str__(self) -> str:
        return f"{self.stream}.{self.layer}"
