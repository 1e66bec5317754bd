"""Documents from wherever they are: text, JSON-lines or Parquet files, or a data set on a hub."""

import glob
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trainer.errors import BadCorpus
from trainer.files import sha256

TEXT_FIELD = "text"
TAG_FIELDS = {"words", "tags", "starts"}
SUFFIXES = (".txt", ".jsonl", ".parquet")


def documents(specs: Iterable[str]) -> Iterator[str]:
    """The documents of each spec in turn, empty ones left out.

    A spec is a path or glob of .txt (a document each), .jsonl or .parquet files (column `text`), or
    else the id of a hub data set, `owner/name` or `owner/name:configuration` (split `train`).
    """
    for spec in specs:
        found = False
        for text in _documents(spec):
            if text.strip():
                found = True
                yield text
        if not found:
            raise BadCorpus(f"corpus {spec!r} has no text")


def tagged(specs: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The records of .jsonl files with `words`, `tags` and `starts` beside `text`, such as `brown.read` makes."""
    for spec in specs:
        for path in _files(spec):
            if path.suffix == ".jsonl":
                yield from (record for record in _records(path) if record.keys() >= TAG_FIELDS)


def fingerprint(specs: Iterable[str]) -> dict[str, str]:
    """What is known of each spec's content: the sha256 of each file, `hub` for a data set."""
    known: dict[str, str] = {}
    for spec in specs:
        for path in _files(spec):
            known[str(path)] = sha256(path)
        if _is_hub_id(spec):
            known[spec] = "hub"
    return known


def _documents(spec: str) -> Iterator[str]:
    if _is_hub_id(spec):
        yield from _hub(spec)
    for path in _files(spec):
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
        elif path.suffix == ".jsonl":
            yield from _jsonl(path)
        else:
            yield from _parquet(path)


def _is_hub_id(spec: str) -> bool:
    return not spec.endswith(SUFFIXES)


def _files(spec: str) -> list[Path]:
    if _is_hub_id(spec):
        return []
    paths = [Path(path) for path in sorted(glob.glob(spec, recursive=True))]
    if not paths:
        raise BadCorpus(f"corpus {spec!r}: no such file; `python -m trainer corpus` fetches two")
    return paths


def _jsonl(path: Path) -> Iterator[str]:
    return (record[TEXT_FIELD] for record in _records(path))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise BadCorpus(f"{path}, line {number} is not JSON: {error}") from error
            _text(record, f"{path}, line {number}")
            yield record


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    if TEXT_FIELD not in file.schema_arrow.names:
        raise BadCorpus(f"{path} has columns {', '.join(file.schema_arrow.names)}, no `text`")
    for batch in file.iter_batches(columns=[TEXT_FIELD]):
        for record in batch.to_pylist():
            yield _text(record, str(path))


def _hub(spec: str) -> Iterator[str]:
    import datasets

    name, _, configuration = spec.partition(":")
    try:
        records = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        for record in records:
            yield _text(record, spec)
    except (OSError, ValueError) as error:
        raise BadCorpus(
            f"corpus {spec!r} is neither a {', '.join(SUFFIXES)} file nor a hub data set that can "
            f"be read: {error}"
        ) from error


def _text(record: Any, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(TEXT_FIELD), str):
        raise BadCorpus(f"{where} has no string field `{TEXT_FIELD}`")
    return record[TEXT_FIELD]
