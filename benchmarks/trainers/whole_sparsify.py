"""eai-sparsify: `Trainer.fit` in a hook of the model, which has no head but all of its layers."""

import tempfile

from datasets import Dataset
from sparsify import SaeConfig, TrainConfig, Trainer
from transformers import AutoModel
from whole import Whole


def main() -> None:
    whole = Whole()
    job = whole.job
    contexts = Dataset.from_dict({"input_ids": whole.contexts.tolist()}).with_format("torch")
    model = AutoModel.from_pretrained(job["model"], dtype="auto")
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SaeConfig(num_latents=job["n_features"], k=job["k"]),
            batch_size=job["batch"] // whole.contexts.shape[1],
            hookpoints=[f"layers.{job['layer']}"],
            init_seeds=[job["seed"]],
            log_to_wandb=False,
            save_every=1_000_000,
            save_dir=folder,
            run_name="run",
        )
        trainer = Trainer(config, contexts, model)

        def run() -> int:
            trainer.fit()
            return whole.contexts.numel()

        whole.run(run)


if __name__ == "__main__":
    main()
