"""dictionary_learning: `trainSAE` on its `ActivationBuffer`, for which nnsight runs the model on text."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from nnsight import LanguageModel
from transformers import PreTrainedTokenizerFast
from whole import Whole


def main() -> None:
    whole = Whole()
    job = whole.job
    length = whole.contexts.shape[1]
    steps = whole.contexts.numel() // job["batch"]
    # The release of transformers that it takes does not know the tokenizer's class in newer folders.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(job["model"]) / "tokenizer.json"), pad_token="<|im_end|>"
    )
    model = LanguageModel(
        job["model"],
        tokenizer=tokenizer,
        device_map="cpu",
        torch_dtype=getattr(torch, job["dtype"]),
        dispatch=True,
    )

    def texts() -> Iterator[str]:
        while True:
            yield from model.tokenizer.batch_decode(whole.contexts)

    buffer = ActivationBuffer(
        texts(),
        model,
        model.model.layers[job["layer"]],
        d_submodule=job["d_model"],
        n_ctxs=2 * job["batch"] // length,
        ctx_len=length,
        refresh_batch_size=job["batch"] // length,
        out_batch_size=job["batch"],
        device="cpu",
    )
    trainer = {
        "trainer": TopKTrainer,
        "steps": steps,
        "activation_dim": job["d_model"],
        "dict_size": job["n_features"],
        "k": job["k"],
        "layer": job["layer"],
        "lm_name": job["model"],
        "seed": job["seed"],
        "device": "cpu",
        "warmup_steps": steps // 10,
        "decay_start": int(0.8 * steps),
    }

    def run() -> int:
        with tempfile.TemporaryDirectory() as folder:
            trainSAE(
                data=buffer,
                trainer_configs=[trainer],
                steps=steps,
                save_dir=folder,
                device="cpu",
                autocast_dtype=torch.float32,
            )
        return steps * job["batch"]

    whole.run(run)


if __name__ == "__main__":
    main()
