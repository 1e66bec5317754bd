"""The one custom op that the model calls behind each site.

torch.compile keeps it opaque, so what it does may change from step to step while compiled code stays valid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from steer_server.dictionary.site import Site
from steer_server.errors import EditNotApplied, UnsupportedVllm
from steer_server.vllm_plugin.runtime import Runtime

_library = torch.library.Library("steer", "FRAGMENT")
_installed: list[tuple[Runtime, dict[int, int]]] = []
_STREAMS = ("attn_out", "mlp_out", "resid_post")


def install(runtime: Runtime, sites: Sequence[Site]) -> None:
    """Makes `runtime` what the op calls. A process holds one model, so this happens once."""
    if _installed:
        raise UnsupportedVllm("a model with sites is already loaded in this process")
    _installed.append((runtime, {code(site): number for number, site in enumerate(sites)}))
    direct_register_custom_op(
        "site", _site, mutates_args=["hidden"], fake_impl=_fake, target_lib=_library
    )


def code(site: Site) -> int:
    """What compiled code calls the site: its place in the model, so that no other engine's code is mistaken for ours."""
    return len(_STREAMS) * site.layer + _STREAMS.index(site.stream)


def call(hidden: Tensor, residual: Tensor | None, code: int) -> None:
    """Reads and edits x = hidden + residual at the site, in place in `hidden`."""
    torch.ops.steer.site(hidden, residual, code)


def _site(hidden: Tensor, residual: Tensor | None, code: int) -> None:
    runtime, numbers = _installed[0]
    if code not in numbers:
        layer, stream = divmod(code, len(_STREAMS))
        raise EditNotApplied(
            f"the compiled model calls the op at {_STREAMS[stream]}.{layer}, which this engine does not serve: "
            "vLLM has loaded code that was compiled for other sites; empty its compile cache"
        )
    runtime.at_site(hidden, residual, numbers[code])


def _fake(hidden: Tensor, residual: Tensor | None, code: int) -> None:
    return None
