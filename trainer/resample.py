"""Dead features begin anew, each as a token that its dictionary explains badly.

As in Bricken et al., "Towards Monosemanticity" (2023), appendix "Neuron Resampling"; there from 819,200 tokens, here from
those of the step's batch.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steer_server.dictionary.dictionary import Dictionary

_ENCODER_NORM = 0.2
"""Of the mean norm of what is alive: small enough not to disturb what is learned already."""
_DIRECTIONS = ("W_dec", "W_enc", "M")


def resample_(
    parameters: dict[str, Tensor],
    first: dict[str, Tensor],
    dead: Bool[Tensor, " features"],
    x: Float[Tensor, "tokens d_model"],
    dictionary: Dictionary,
    generator: torch.Generator,
) -> None:
    """Changes the dead features' rows of one member's `parameters`; `dictionary` is the member as it is.

    Tokens are drawn with probability proportional to the square of their squared error, each once if they suffice.
    A row takes the token's direction, with the mean norm of rows alive, or in an encoder apart from its decoder a fifth
    of it; what else a feature has becomes what it was in the `first` parameters.
    """
    rows = dead.nonzero().squeeze(1)
    error = (x - dictionary.decode(dictionary.encode(x))).square().sum(dim=1)
    # Relative to the largest, whose square might overflow.
    weight = (error / error.max().clamp(min=1e-30)).square().cpu()
    again = int(torch.count_nonzero(weight)) < len(rows)
    if not weight.any():
        return
    tokens = torch.multinomial(weight, len(rows), replacement=again, generator=generator)
    centred = x[tokens.to(x.device)] - parameters.get("b_dec", 0.0)
    directions = torch.nn.functional.normalize(centred, dim=1)
    for name, value in parameters.items():
        if name in _DIRECTIONS:
            norms = torch.linalg.vector_norm(value, dim=1)
            norm = norms[~dead].mean() if not dead.all() else norms.mean()
            value[rows] = directions * (norm * _ENCODER_NORM if name == "W_enc" else norm)
        elif name != "b_dec":
            value[rows] = first[name][rows]
