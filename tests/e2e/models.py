"""Small models and adapters made on the spot, for engine settings that the real model cannot take.

Weights are random but for the tokenizer, so greedy texts are noise; references still agree on every token.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LAYERS = 4


def make_tiny_llama(folder: Path, tokenizer: Path) -> Path:
    """A random Llama in float32 whose 4 heads and 2 KV heads divide over two tensor-parallel ranks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        # The default, 0.02, gives logits so close together that rounding would choose the token.
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    copy_tokenizer(tokenizer, folder)
    return folder


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, folder / name)


def make_lora(model: Path, folder: Path, rank: int = 8) -> tuple[Path, dict[str, Tensor]]:
    """An adapter in peft's file format, and the model's weights with it merged in, by parameter name."""
    config = json.loads((model / "config.json").read_text())
    width = config["hidden_size"]
    values = config["num_key_value_heads"] * width // config["num_attention_heads"]
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.v_proj": (values, width),
        "mlp.down_proj": (width, config["intermediate_size"]),
    }
    generator = torch.Generator().manual_seed(0)
    weights = load_file(model / "model.safetensors")
    tensors, merged = {}, {}
    for layer in range(config["num_hidden_layers"]):
        for module, (rows, columns) in shapes.items():
            name = f"model.layers.{layer}.{module}"
            a = 0.06 * torch.randn(rank, columns, generator=generator)
            b = 0.06 * torch.randn(rows, rank, generator=generator)
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            merged[f"{name}.weight"] = weights[f"{name}.weight"] + 2 * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [module.rpartition(".")[2] for module in shapes],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return folder, merged


def make_with(weights: Mapping[str, Tensor], model: Path, folder: Path) -> Path:
    """`model` with `weights` in the place of its own: a reference for transformers."""
    shutil.copytree(model, folder)
    kept = load_file(model / "model.safetensors")
    # The copy's file, should it be a link, must not lead to the original.
    (folder / "model.safetensors").unlink()
    save_file(kept | dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_int8(model: Path, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """`model` in compressed-tensors W8A8: per-channel int8 weights, activations quantised per token as they come.

    Also the weights that the int8 numbers stand for, by parameter name.
    """
    folder.mkdir()
    copy_tokenizer(model, folder)
    stored, meant = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        stored[name] = weight
        if name.endswith("_proj.weight"):
            # Without VNNI (AVX2) oneDNN adds pairs of products in 16 bits, which larger weights overflow.
            scale = weight.abs().amax(dim=1, keepdim=True) / 63
            stored[name] = (weight / scale).round().to(torch.int8)
            stored[f"{name}_scale"] = scale
            meant[name] = stored[name] * scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    integer = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": integer | {"strategy": "channel", "dynamic": False},
        "input_activations": integer | {"strategy": "token", "dynamic": True},
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, meant


def quantise_inputs(model: nn.Module) -> None:
    """Rounds what goes into each projection as the kernels of `make_int8`'s model do, for a reference in float32."""

    def rounded(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale = inputs[0].abs().amax(dim=-1, keepdim=True) / 127
        return ((inputs[0] / scale).round() * scale, *inputs[1:])

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(rounded)
