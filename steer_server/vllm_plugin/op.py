"""The one custom op that the model calls behind each site.

torch.compile keeps it opaque, so what it does may change from step to step while compiled code stays valid.
"""

import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from steer_server.errors import UnsupportedVllm
from steer_server.vllm_plugin.runtime import Runtime

_library = torch.library.Library("steer", "FRAGMENT")
_runtime: list[Runtime] = []


def install(runtime: Runtime) -> None:
    """Makes `runtime` what the op calls. A process holds one model, so this happens once."""
    if _runtime:
        raise UnsupportedVllm("a model with sites is already loaded in this process")
    _runtime.append(runtime)
    direct_register_custom_op(
        "site", _site, mutates_args=["hidden"], fake_impl=_fake, target_lib=_library
    )


def call(hidden: Tensor, residual: Tensor | None, site: int) -> None:
    """Reads and edits x = hidden + residual at the site, in place in `hidden`."""
    torch.ops.steer.site(hidden, residual, site)


def _site(hidden: Tensor, residual: Tensor | None, site: int) -> None:
    _runtime[0].at_site(hidden, residual, site)


def _fake(hidden: Tensor, residual: Tensor | None, site: int) -> None:
    return None
