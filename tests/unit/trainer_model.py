"""A tiny random Llama with its tokenizer and a corpus of random words with their tags."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.config import TrainConfig

WORDS = "the a cat dog sat ran on under mat house and then it was old red big small"
TAGS = "at at nn nn vbd vbd in in nn nn cc rb pps bedz jj jj jj jj"


def write_model(folder: Path) -> Path:
    """Four layers of width 16; embeddings long enough for the layers to matter."""
    torch.manual_seed(0)
    words = WORDS.split()
    config = LlamaConfig(
        vocab_size=len(words) + 2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def tiny_config(model: Path, folder: Path) -> TrainConfig:
    """Trains in well under a second; its corpus and its `out` are in `folder`."""
    generator = torch.Generator().manual_seed(1)
    words, tags = WORDS.split(), TAGS.split()
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(60):
            picked = torch.randint(len(words), (90,), generator=generator).tolist()
            chosen = [words[word] for word in picked]
            starts = [len(" ".join([*chosen[:place], ""])) for place in range(len(chosen))]
            record = {"text": " ".join(chosen), "words": chosen, "starts": starts}
            file.write(json.dumps(record | {"tags": [tags[word] for word in picked]}) + "\n")
    return TrainConfig(
        model=str(model),
        site="resid_post.1",
        corpus={str(folder / "text.jsonl"): 1.0},
        out=str(folder / "out" / "tiny"),
        tokens=4096,
        eval_tokens=256,
        n_features=24,
        architecture="tied_relu",
        loss_reduction="mean",
        alpha=1e-2,
        lr=1e-3,
        warmup=0,
        decay=0.0,
        clip=0.0,
        batch=64,
        epochs=2,
        context=32,
        holdout_every=10,
        activation_dtype="float32",
        threads=1,
    )
