"""SAELens: `SAETrainer.fit`, and of a sweep `MultiSAETrainer.fit`, on a data provider of ours."""

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from gate import Gate
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    SAETrainer,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor

SCALE_BATCHES = 20


def main() -> None:
    gate = Gate()
    job = gate.job
    torch.manual_seed(job["seed"])
    gate.let_through(SCALE_BATCHES)
    lr = 1e-3 if job["alphas"] else 3e-4
    cfg = SAETrainerConfig(
        total_training_samples=job["steps"] * job["batch"],
        train_batch_size_samples=job["batch"],
        lr=lr,
        lr_end=lr / 10,  # as its runner sets it
        lr_decay_steps=job["steps"] // 5 if job["out"] else 0,
        n_batches_for_norm_estimate=SCALE_BATCHES,
    )
    if job["alphas"]:
        saes = {f"alpha{alpha:.3g}": standard(job, alpha) for alpha in job["alphas"]}
        MultiSAETrainer(cfg, saes, dict.fromkeys(saes, "site"), Shared(gate)).fit()
    else:
        save(gate, SAETrainer(cfg, top_k(job), gate).fit())


def save(gate: Gate, trained: TopKTrainingSAE) -> None:
    """As it is for inference, the scale of the input folded in."""
    with tempfile.TemporaryDirectory() as folder:
        trained.save_inference_model(folder)
        sae = SAE.load_from_disk(folder)
    kind = {"center_input": sae.cfg.apply_b_dec_to_input}
    if sae.cfg.architecture() == "topk":
        kind |= {"activation": "top_k", "k": sae.cfg.k}
    else:
        kind |= {"activation": "jump_relu"}
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    tensors = {name: part for name, part in sae.state_dict().items() if name in names}

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        f = sae.encode(x)
        return f, sae.decode(f)

    gate.save(tensors, kind, reconstruct)


def shape(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "d_in": job["d_model"],
        "d_sae": job["n_features"],
        "normalize_activations": "expected_average_only_in",
    }


def top_k(job: dict[str, Any]) -> TopKTrainingSAE:
    if job["architecture"] == "batch_top_k":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape(job), k=job["k"]))
    sparse = job["architecture"] == "top_k sparse"
    config = TopKTrainingSAEConfig(
        **shape(job),
        k=job["k"],
        use_sparse_activations=sparse,
        # With its default, True, torch has no backward for sparse activations on a CPU.
        rescale_acts_by_decoder_norm=not sparse,
    )
    return TopKTrainingSAE(config)


def standard(job: dict[str, Any], alpha: float) -> StandardTrainingSAE:
    # Its squared error is summed over d_model, the paper's averaged.
    l1 = alpha * job["d_model"]
    return StandardTrainingSAE(StandardTrainingSAEConfig(**shape(job), l1_coefficient=l1))


class Shared(Iterator[dict[str, Tensor]]):
    """The batches as a trainer of many dictionaries wants them."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __next__(self) -> dict[str, Tensor]:
        return {"site": next(self._gate)}


if __name__ == "__main__":
    main()
