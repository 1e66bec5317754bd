"""A step of the architectures with a k can be recorded as a CUDA graph: nothing in it waits for the device.

Without a GPU torch's fake one stands in: it knows shapes and devices only, so whatever depends on a number fails.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config import TrainConfig
from trainer.errors import TrainerError
from trainer.stack import Stack
from trainer.top_k import TopK

CONFIG = TrainConfig(
    model="m",
    site="resid_post.0",
    corpus={"c": 1.0},
    out="out",
    tokens=1,
    n_features=16384,
    architecture="top_k",
    k=32,
    batch=4096,
)


_SAME: dict[Any, Any] = {
    Tensor.__invert__: torch.bitwise_not,
    Tensor.copy_: torch.ops.aten.copy_,
}
_READS = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.item, Tensor.tolist, Tensor.cpu)


class Waits(Exception):
    """The host needs a number of the device's."""


class Recording(TorchDispatchMode):
    """What a capture would see: operators by name, none of them a copy between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        # Torch's own, and without a fake.
        if func.name().startswith("aten::_fused_adam_"):
            return None
        found = func(*args, **(kwargs or {}))
        if func.name() in ("aten::_to_copy", "aten::copy_"):
            given = [part for part in (found, *args) if isinstance(part, Tensor)]
            if len({part.device.type for part in given}) > 1:
                raise Waits("a copy between host and device")
        return found


class Indexing(TorchFunctionMode):
    """What Python's bindings do, as operators, for torch's CPU build has no guard of a fake GPU's tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return indexed(*args)
        if func is Tensor.__setitem__:
            return torch.ops.aten.copy_(indexed(*args[:2]), args[2])
        if func in _READS and args[0].is_cuda:
            raise Waits(func.__name__)
        return _SAME.get(func, func)(*args, **(kwargs or {}))


def indexed(found: Tensor, index: Any) -> Tensor:
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, int):
            found = found.select(dim, part)
            continue
        if part is None:
            found = found.unsqueeze(dim)
        else:
            assert isinstance(part, slice), "an index of tensors waits, or needs another look"
            found = torch.ops.aten.slice(found, dim, part.start, part.stop, part.step or 1)
        dim += 1
    return found


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.stack.device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (2**40, 2**40))


def recorded(*configs: TrainConfig, revive: bool = True) -> list[str]:
    """The operators of a step; fails on the first that waits."""
    with FakeTensorMode(), Indexing(), torch.no_grad():
        stack = Stack(configs, torch.zeros(1024), steps=100)
        x = torch.empty(4096, 1024, device="cuda:0")
        with Recording() as recording:
            stack.update(x, revive)
    return recording.seen


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["top_k", "batch_top_k", "matryoshka"])
def test_no_operator_of_a_step_waits_for_the_device(architecture: str, precision: str) -> None:
    config = replace(CONFIG, architecture=architecture, precision=precision)

    seen = recorded(config, replace(config, k=20, lr=1e-3))

    assert {"trainer::compress", "trainer::weighted_sum", "trainer::dot"} <= set(seen)
    assert ("aten::bmm.dtype" in seen) == (precision == "bfloat16")


@pytest.mark.usefixtures("fake_gpu")
def test_where_no_feature_can_be_dead_none_is_looked_for() -> None:
    assert len(recorded(CONFIG, revive=False)) < len(recorded(CONFIG))


@pytest.mark.usefixtures("fake_gpu")
def test_an_architecture_that_counts_its_features_waits() -> None:
    with pytest.raises(Waits):
        recorded(replace(CONFIG, architecture="relu", k=0, alpha=1.0))


def test_a_step_out_of_the_numbers_reaches_no_checkpoint() -> None:
    config = replace(CONFIG, architecture="relu", n_features=40, k=0, alpha=1.0)
    stack = Stack([config], torch.zeros(8), steps=10)
    x = torch.randn(16, 8)
    with torch.no_grad():
        stack.update(x, True)
        stack.update(x * torch.nan, True)
        stack.update(x, True)

    for keep in (stack.tensors, lambda: stack.dictionaries(1.0)):
        with pytest.raises(TrainerError, match="out is not finite at step 1"):
            keep()


@pytest.mark.parametrize("architecture", ["top_k", "batch_top_k"])
def test_looking_for_dead_features_where_none_is_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    monkeypatch.setattr(TopK, "_revive", TopK._revive_all)
    config = replace(CONFIG, architecture=architecture, n_features=40, k=3)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    looked, not_looked = (Stack([config], torch.zeros(8), steps=10) for _ in range(2))
    with torch.no_grad():
        for _ in range(3):
            looked.update(x, True)
            not_looked.update(x, False)

    for name, value in looked.tensors().items():
        assert torch.equal(value, not_looked.tensors()[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["top_k", "batch_top_k", "matryoshka"])
def test_a_replayed_graph_is_the_step_bit_for_bit(architecture: str, precision: str) -> None:
    config = replace(
        CONFIG, architecture=architecture, precision=precision, n_features=2048, dead_after=2000
    )
    configs = [config, replace(config, k=20, lr=1e-3, out="other")]
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(512, 256, generator=generator).cuda() for _ in range(12)]
    graph, eager = (Stack(configs, torch.zeros(256), steps=12) for _ in range(2))
    eager._replayed = lambda x, revive: eager.update(x, revive)  # type: ignore[assignment]
    with torch.no_grad():
        for x in batches:
            ours, theirs = graph.advance(x), eager.advance(x)
            assert torch.equal(ours.loss, theirs.loss)

    for name, value in graph.tensors().items():
        assert torch.equal(value, eager.tensors()[name]), name
