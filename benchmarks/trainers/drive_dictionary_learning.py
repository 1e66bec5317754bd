"""dictionary_learning: `trainSAE` on a generator of ours."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from gate import Gate
from torch import Tensor

SCALE_BATCHES = 102
"""What its `get_norm_factor` reads."""


class Batches:
    """Iterated twice: for the scale, and for the steps."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __iter__(self) -> Iterator[Tensor]:
        return self._gate


def main() -> None:
    gate = Gate()
    job = gate.job
    gate.let_through(SCALE_BATCHES)
    with tempfile.TemporaryDirectory() as folder:
        trainSAE(
            data=Batches(gate),
            trainer_configs=configs(job),
            steps=job["steps"],
            save_dir=folder,
            normalize_activations=True,
            device="cpu",
        )
        save(gate, Path(folder) / "trainer_0" / "ae.pt")


def save(gate: Gate, path: Path) -> None:
    """As it is for inference, the scale of the input folded in."""
    over_batch = gate.job["architecture"] == "batch_top_k"
    kind = {"center_input": True, "activation": "jump_relu" if over_batch else "top_k"}
    ae = (BatchTopKSAE if over_batch else AutoEncoderTopK).from_pretrained(path)
    tensors = {
        "W_enc": ae.encoder.weight.T,
        "b_enc": ae.encoder.bias,
        "W_dec": ae.decoder.weight.T,
        "b_dec": ae.b_dec,
    }
    if over_batch:
        tensors["threshold"] = ae.threshold.expand(ae.dict_size)
    else:
        kind["k"] = int(ae.k)

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        f = ae.encode(x)
        return f, ae.decode(f)

    gate.save(tensors, kind, reconstruct)


def configs(job: dict[str, Any]) -> list[dict[str, Any]]:
    common = {
        "steps": job["steps"],
        "activation_dim": job["d_model"],
        "dict_size": job["n_features"],
        "layer": 0,
        "lm_name": "none",
        "seed": job["seed"],
        "device": "cpu",
    }
    if job["alphas"]:
        # Its x has E|x|^2 = 1, the paper's alpha is that of E|x|^2 = d_model and of an error averaged over d_model.
        return [
            common
            | {
                "trainer": StandardTrainerAprilUpdate,
                "lr": 1e-3,
                "l1_penalty": alpha * math.sqrt(job["d_model"]),
                "warmup_steps": 0,
                "sparsity_warmup_steps": None,
            }
            for alpha in job["alphas"]
        ]
    trainer = {"top_k": TopKTrainer, "batch_top_k": BatchTopKTrainer}[job["architecture"]]
    own = {"trainer": trainer, "k": job["k"]}
    if job["out"]:
        # Its 1,000 steps of warm-up and before the threshold are meant for trainings of tens of thousands.
        steps = job["steps"]
        own |= {
            "warmup_steps": min(1000, steps // 10),
            "threshold_start_step": min(1000, steps // 2),
            "decay_start": int(0.8 * steps),
        }
    return [common | own]


if __name__ == "__main__":
    main()
