"""What the README claims is what the repository holds."""

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.report import PAGES, filled

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_those_of_the_committed_results(page: str) -> None:
    assert filled(page) == (ROOT / page).read_text(), "run `python benchmarks/report.py --write`"


def test_every_make_target_it_names_exists() -> None:
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.M))
    help_text = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout

    assert named
    assert named <= set(re.findall(r"make ([a-z-]+)", help_text))


def test_every_link_leads_somewhere() -> None:
    for name in ("README.md", "ARCHITECTURE.md", "deploy/README.md", "examples/README.md", *PAGES):
        page = ROOT / name
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{name} links to {target}"


def test_no_page_is_too_long_to_read() -> None:
    assert len(README.splitlines()) <= 180
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 150
