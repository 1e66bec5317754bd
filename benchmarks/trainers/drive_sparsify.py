"""eai-sparsify: `Trainer.fit`, which trains in a hook of a model. The model here looks activations up by token id."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from gate import Gate
from sparsify import SaeConfig, SparseCoder, TrainConfig, Trainer
from torch import Tensor, nn

LENGTH = 256
"""Of the sequences; a step has batch / LENGTH of them."""


class Rows:
    """A data set of as many sequences as the steps take; what they hold does not matter."""

    def __init__(self, sequences: int) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return self._sequences

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(LENGTH, dtype=torch.int64)}


class Model(nn.Module):
    """What `Trainer` asks of a model of transformers; `site` is the module that it hooks."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.site = nn.Identity()
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
        self._gate = gate

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.numel() == 1:  # the look at the width
            return self.site(self._gate.x[input_ids])
        return self.site(next(self._gate).view(*input_ids.shape, -1))


def main() -> None:
    gate = Gate()
    with tempfile.TemporaryDirectory() as folder:
        train(gate, folder)
        save(gate, Path(folder) / "run" / "site")


def train(gate: Gate, folder: str) -> None:
    """Leaves its checkpoint in the folder."""
    job = gate.job
    sequences = job["batch"] // LENGTH
    config = TrainConfig(
        SaeConfig(num_latents=job["n_features"], k=job["k"]),
        batch_size=sequences,
        hookpoints=["site"],
        init_seeds=[job["seed"]],
        log_to_wandb=False,
        save_every=1_000_000,
        save_dir=folder,
        run_name="run",
    )
    Trainer(config, Rows(sequences * job["steps"]), Model(gate)).fit()


def save(gate: Gate, path: Path) -> None:
    """The checkpoint has the averaged weights of schedule-free training, those in memory are others."""
    sae = SparseCoder.load_from_disk(path)
    tensors = {
        "W_enc": sae.encoder.weight.T,
        "b_enc": sae.encoder.bias,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        values, features, _ = sae.encode(x)
        f = torch.zeros(len(x), sae.num_latents).scatter(1, features, values)
        return f, sae.decode(values, features)

    gate.save(tensors, {"center_input": True, "activation": "top_k", "k": sae.cfg.k}, reconstruct)


if __name__ == "__main__":
    main()
