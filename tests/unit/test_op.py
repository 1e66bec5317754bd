"""What compiled code may call; `vllm_modes/stale_cache.py` has vLLM's own compile cache do it, nightly."""

from types import SimpleNamespace

import pytest
import torch

from steer_server.dictionary.site import Site
from steer_server.errors import EditNotApplied
from steer_server.vllm_plugin import op


def test_code_that_was_compiled_for_another_site_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, elsewhere = Site("mlp_out", 3), Site("resid_post", 3)
    called = []
    runtime = SimpleNamespace(at_site=lambda hidden, residual, number: called.append(number))
    monkeypatch.setattr(op, "_installed", [(runtime, {op.code(here): 7})])
    hidden = torch.zeros(1, 2)

    op._site(hidden, None, op.code(here))
    with pytest.raises(EditNotApplied, match=r"resid_post\.3.*empty its compile cache"):
        op._site(hidden, None, op.code(elsewhere))

    assert called == [7]
