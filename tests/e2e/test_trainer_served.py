"""Activations for the trainer from the serving engine, against those from transformers in float32."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from steer_server.dictionary.files import StoredDictionary
from steer_server.dictionary.site import Site
from tests.conftest import SITE
from tests.e2e.models import LAYERS, make_tiny_llama
from trainer import harvest, served
from trainer.config import TrainConfig
from trainer.difference import difference
from trainer.model import Read, load_model, load_tokenizer, read_sites
from trainer.stop import Stop

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]

SITES = [Site.parse("mlp_out.4"), SITE]
CONTEXT, SHARED, CHUNK = 160, 150, 96
"""The shared prefix fills a block of vLLM's prefix cache, which has 128 tokens on CPU."""
CLOSE = 1e-4


@pytest.fixture(scope="module")
def config(model_path: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model_path),
        site=str(SITE),
        corpus={"none.txt": 1.0},
        out="none",
        tokens=1,
        n_features=1,
        k=1,
        context=CONTEXT,
        activation_dtype="float32",
        source="vllm",
        served_dtype="float32",
    )


@pytest.fixture(scope="module")
def contexts(config: TrainConfig) -> Tensor:
    """Four texts; the second begins like the first, the last is the first once more."""
    tokenizer = load_tokenizer(config.model)
    texts = [" ".join(f"{word} number {n};" for n in range(60)) for word in ("odd", "even", "big")]
    first, second, third = (tokenizer(text)["input_ids"][:CONTEXT] for text in texts)
    return torch.tensor(
        [first, [*first[:SHARED], *second[SHARED:]], third, first], dtype=torch.int32
    )


@pytest.fixture(scope="module")
def read(config: TrainConfig) -> Iterator[Read]:
    """Of a running engine. A site takes six read-outs, so that the two take more than one request may have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "WIDEST", 100)
        with served.served(config, SITES, Stop(), CHUNK) as read:
            yield read


@pytest.fixture(scope="module")
def expected(config: TrainConfig, contexts: Tensor) -> list[Tensor]:
    return read_sites(load_model(config.model), SITES, contexts)


def test_vllm_gives_what_transformers_gives_at_every_position(
    read: Read, expected: list[Tensor], contexts: Tensor, random_dictionary: StoredDictionary
) -> None:
    found = read(SITES, contexts)

    for site, x, other in zip(SITES, expected, found, strict=True):
        here = [random_dictionary] if site == random_dictionary.card.site else []
        row = difference(x.flatten(0, 1), other.flatten(0, 1), here)
        assert row.max < CLOSE
        assert all(share > 0.999 for share in row.same_top.values())
        assert not torch.equal(x[0], x[1])


def test_contexts_that_are_in_the_prefix_cache_are_read_whole(
    read: Read, expected: list[Tensor], contexts: Tensor
) -> None:
    read(SITES, contexts[:1])

    (again,) = read(SITES[1:], contexts[3:])

    assert difference(expected[1][0], again[0]).max < CLOSE


def test_a_harvest_keeps_the_same_rows_from_either_source(
    read: Read,
    config: TrainConfig,
    contexts: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harvest, "served", lambda *_: nullcontext(read))
    monkeypatch.setattr(harvest, "SHARD_CONTEXTS", 3)
    here = replace(config, source="transformers", served_dtype="auto")
    for each in (config, here):
        (tmp_path / each.source).mkdir()
        packed = {"train": contexts, "heldout": contexts[:1].clone()}
        save_file(packed, tmp_path / each.source / harvest.TOKENS)

    one, other = (
        harvest.harvest(each, SITES, tmp_path / each.source, Stop()) for each in (config, here)
    )

    for site in SITES:
        assert [len(shard) for shard in one[site].shards] == [
            len(shard) for shard in other[site].shards
        ]
        for mine, theirs in zip(one[site].rows, other[site].rows, strict=True):
            assert torch.equal(mine, theirs)
        index = torch.arange(other[site].count)
        assert difference(other[site].gather(index), one[site].gather(index)).max < CLOSE


def processes(group: int) -> list[str]:
    """The command lines of the processes of a group that live."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, number = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(number) == group and state != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            # It has ended.
            continue
    return found


@pytest.mark.nightly
def test_ctrl_c_leaves_whole_shards_and_no_processes_and_the_harvest_goes_on(
    model_path: Path, tmp_path: Path
) -> None:
    model = make_tiny_llama(tmp_path / "tiny", model_path)
    text = " ".join(f"line {n} of a long text, and then another;" for n in range(4000))
    with (tmp_path / "text.jsonl").open("w") as file:
        for _ in range(20):
            file.write(json.dumps({"text": text}) + "\n")
    out, runs = tmp_path / "out" / "made", tmp_path / "runs"
    (tmp_path / "c.toml").write_text(f"""
model = "{model}"
site = "resid_post.{LAYERS - 2}"
out = "{out}"
tokens = 131072
eval_tokens = 1024
n_features = 64
k = 4
context = 128
source = "vllm"
served_dtype = "float32"
[corpus]
"{tmp_path / "text.jsonl"}" = 1
""")
    command = [sys.executable, "-m", "trainer", "train", tmp_path / "c.toml", "--runs", runs]
    first = None
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0) as run:
        while run.poll() is None and first is None:
            first = next(runs.glob("activations-*/resid_post*/shard-00000.safetensors"), None)
            time.sleep(0.05)
        # As a terminal does it: to every process, vLLM's among them.
        os.killpg(run.pid, signal.SIGINT)
        assert run.stderr is not None
        told = run.stderr.read()
    assert run.returncode == 130, told
    assert "the harvest has every shard before shard-0" in told
    assert "Traceback" not in told
    assert processes(run.pid) == []
    assert first is not None
    before = first.read_bytes()

    subprocess.run(command, check=True)

    assert first.read_bytes() == before
    assert (out / "weights.safetensors").exists()
