"""SAELens: `LanguageModelSAETrainingRunner` on tokenised contexts, the model as transformers has it."""

from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)
from whole import Whole


def main() -> None:
    whole = Whole()
    job = whole.job
    length = whole.contexts.shape[1]
    steps = whole.contexts.numel() // job["batch"]
    sae = TopKTrainingSAEConfig(
        d_in=job["d_model"],
        d_sae=job["n_features"],
        k=job["k"],
        normalize_activations="expected_average_only_in",
        # The faster of its two ways; see drive_sae_lens.py.
        use_sparse_activations=True,
        rescale_acts_by_decoder_norm=False,
    )
    cfg = LanguageModelSAERunnerConfig(
        sae=sae,
        model_name=job["model"],
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": "auto"},
        hook_name=f"model.layers.{job['layer']}",
        dataset_path="none",
        streaming=False,
        context_size=length,
        prepend_bos=False,
        n_batches_in_buffer=2 * job["batch"] // length,
        store_batch_size_prompts=job["batch"] // length,
        training_tokens=steps * job["batch"],
        train_batch_size_tokens=job["batch"],
        # Its scale is that of so few batches, or it would take longer than the training.
        n_batches_for_norm_estimate=1,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        seed=job["seed"],
        verbose=False,
    )
    contexts = Dataset.from_dict({"input_ids": whole.contexts.tolist()})
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=contexts)

    def run() -> int:
        runner.run()
        return steps * job["batch"]

    whole.run(run)


if __name__ == "__main__":
    main()
