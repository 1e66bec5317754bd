"""A library's training loop in a process of its own, as the parent holds it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent


class Worker:
    """Started with the job; it waits for `run`."""

    def __init__(self, name: str, driver: str, interpreter: Path, job: dict[str, Any], log: Path):
        self.name = name
        self._log = log
        threads = str(job["threads"])
        paths = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "PYTHONPATH": paths if driver.endswith("_steer") else "",
            "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
        }
        # Libraries print to stdout what they like, from their import on; answers have a pipe of their own.
        read, write = os.pipe()
        with log.open("w") as printed:
            self._process = subprocess.Popen(
                [interpreter, _HERE / f"{driver}.py", json.dumps(job | {"answers": write})],
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=printed,
                pass_fds=(write,),
                text=True,
                env=environment,
            )
        os.close(write)
        self._answers = os.fdopen(read)

    def ready(self) -> None:
        """Returns when its loop asks for the first batch."""
        self._answer()

    def run(self, steps: int) -> dict[str, Any]:
        """`seconds` and `cpu_seconds` of so many steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            last = self._log.read_text()[-2000:]
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}:\n{last}")
        return json.loads(line)
