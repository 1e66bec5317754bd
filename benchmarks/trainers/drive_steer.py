"""Our loop, `trainer.train.train`, with its checkpoints and metrics."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from gate import Gate
from torch import Tensor

from steer_server.dictionary.site import Site
from trainer.allocator import keep_freed_memory
from trainer.config import from_mapping
from trainer.harvest import Activations
from trainer.stop import Stop
from trainer.train import train

_SHARD = 16384


@dataclass(frozen=True, eq=False, kw_only=True)
class Gated(Activations):
    """Activations that come when the parent asks."""

    gate: Gate

    def gather(self, index: Tensor) -> Tensor:
        self.gate.wait()
        return super().gather(index)


def main() -> None:
    # As the command line does.
    keep_freed_memory()
    gate = Gate()
    job = gate.job
    per_epoch = len(gate.x) // job["batch"]
    keys = {
        "model": "none",
        "corpus": {"none": 1.0},
        "site": "resid_post.0",
        "tokens": len(gate.x),
        "architecture": job["architecture"],
        "n_features": job["n_features"],
        "k": job["k"],
        "batch": job["batch"],
        "epochs": max(1, job["steps"] // per_epoch),
        "threads": job["threads"],
        "seed": job["seed"],
    }
    if not job["out"]:
        # Only to be timed, and the others do not count features as dead so soon.
        keys["dead_after"] = 10_000_000
    if job["alphas"]:
        # The paper's settings; lr as all contestants of the sweep have it.
        keys |= {"loss_reduction": "mean", "lr": 1e-3}
    configs = [
        from_mapping(keys | {"alpha": alpha, "out": f"none/{number}"})
        for number, alpha in enumerate(job["alphas"] or [0.0])
    ]
    shards = list(gate.x.split(_SHARD))
    none = torch.empty(0, dtype=torch.int32)
    activations = Gated(shards, [], none, none, float("inf"), Site.parse(keys["site"]), gate=gate)
    with tempfile.TemporaryDirectory() as folder, Stop() as stop:
        (dictionary, *_) = train(configs, activations, Path(folder), stop)
    kind = {
        "activation": dictionary.activation,
        "input_scale": dictionary.input_scale,
        "center_input": dictionary.center_input,
        "k": dictionary.k,
    }
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    tensors = {name: getattr(dictionary, name) for name in names}

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        f = dictionary.encode(x)
        return f, dictionary.decode(f)

    gate.save({n: t for n, t in tensors.items() if t is not None}, kind, reconstruct)


if __name__ == "__main__":
    main()
