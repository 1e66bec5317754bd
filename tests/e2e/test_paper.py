"""Every experiment of the paper on the real model, in the small setting that ships."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def test_the_report_holds_every_experiment_and_is_not_computed_twice(tmp_path: Path) -> None:
    for name in ("models", "corpora", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "trainer", "report", "examples/paper/small/smollm2-135m.toml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    for _ in range(2):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    # What is there is read, not computed.
    assert "patching: " in done.stderr
    out = tmp_path / "build" / "paper-small"
    page = (out / "report.html").read_text()
    for section in (
        "Automatic interpretability",
        "Features that carry an indirect object",
        "Case studies",
        "Trade-offs",
    ):
        assert f". {section}</h2>" in page
    assert page.count("<svg") >= 8
    curve = json.loads((out / "ioi" / "curve-smollm2-135m-resid_post.10.json").read_text())
    kls = [effect["kl"] for effect in curve["result"]["prompts"]]
    assert kls[0] > 1.5
    assert kls[-1] < kls[0] / 2
