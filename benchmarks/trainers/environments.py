"""The libraries that the trainer is compared with, each in a virtual environment of its own."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

STEER = "steer"
RELEASES = {
    "sae_lens": "sae-lens==6.54.12",
    "sparsify": "eai-sparsify==1.3.3",
    "dictionary_learning": "dictionary-learning==0.1.0",
}
_TITLES = {
    STEER: "steer",
    "sae_lens": "SAELens",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
}
_BARE = {
    # What it and its nnsight need to be imported and to run a model of transformers. They also ask for circuitsvis,
    # umap-learn, llvmlite, plotly and pandas, and for torchvision and diffusers, which only plots and images need.
    "dictionary_learning": [
        "nnsight==0.3.7",
        "transformers<5",
        "accelerate",
        "datasets",
        "einops",
        "pillow",
        "protobuf",
        "pydantic",
        "python-socketio[client]",
        "sentencepiece",
        "wandb",
        "zstandard",
    ],
    # Its trainer imports it without asking for it.
    "sae_lens": ["wandb"],
}
_WITHOUT_DEPENDENCIES = ("dictionary-learning", "nnsight")


def title(library: str) -> str:
    """Its name and release, as tables say it."""
    release = RELEASES.get(library, "").partition("==")[2]
    return f"{_TITLES[library]} {release}".strip()


def python(library: str, folder: Path) -> Path:
    """The interpreter of the library, whose environment is made in `folder` if it is not there."""
    if library == STEER:
        return Path(sys.executable)
    place = folder / library
    done = place / ".done"
    interpreter = place / "bin" / "python"
    # The same torch for all, or the comparison would be one of torch's releases.
    wanted = [f"torch=={metadata.version('torch')}", RELEASES[library], *_BARE.get(library, ())]
    if done.exists() and done.read_text() == "\n".join(wanted):
        return interpreter
    print(f"{library}: making {place}", file=sys.stderr)
    if not interpreter.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
    install = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    bare = [name for name in wanted if name.startswith(_WITHOUT_DEPENDENCIES)]
    subprocess.run([*install, *(name for name in wanted if name not in bare)], check=True)
    if bare:
        subprocess.run([*install, "--no-deps", *bare], check=True)
    done.write_text("\n".join(wanted))
    return interpreter
