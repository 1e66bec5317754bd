"""How a training goes, for those who watch: a bar, JSON lines, and if asked TensorBoard's and Prometheus's files.

The textfile has gauges, with the dictionary's `out` as the label `dictionary` where they are of one dictionary:
steer_training_step, steer_training_steps, steer_training_tokens_per_second, and steer_training_loss, _l0, _fvu and
_dead_share. TensorBoard's scalars are loss, l0, fvu, dead_share and tokens_per_second, with a run for each dictionary.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from tqdm import tqdm

from trainer.config import TrainConfig
from trainer.errors import BadConfig
from trainer.files import whole_file
from trainer.step import Outcome

EVERY = 50
"""Steps between two lines."""
_CURVE_LINES = 500
_VALUES = ("loss", "l0", "fvu", "dead_share")


@dataclass(frozen=True)
class Watchers:
    """Who else is told."""

    tensorboard: Path | None = None
    """Folder for event files."""
    textfile: Path | None = None
    """A .prom file in the folder of node_exporter's textfile collector."""

    def check(self) -> None:
        """BadConfig if what they need is not there."""
        if self.tensorboard:
            try:
                import torch.utils.tensorboard  # noqa: F401
            except ImportError as error:
                raise BadConfig(
                    f"--tensorboard needs the package tensorboard ({error}): pip install tensorboard"
                ) from error
        if not self.textfile:
            return
        try:
            import prometheus_client  # noqa: F401
        except ImportError as error:
            raise BadConfig(
                f"--textfile needs the package prometheus-client ({error}): pip install prometheus-client"
            ) from error
        if self.textfile.suffix != ".prom" or not self.textfile.parent.is_dir():
            raise BadConfig(
                f"--textfile is {self.textfile}; node_exporter reads files named *.prom in a folder that is there"
            )


NOBODY = Watchers()


class _Sink(Protocol):
    def write(self, step: int, rate: float, rows: Sequence[dict[str, Any]]) -> None:
        """`rows` have `_VALUES` and `out` of each dictionary; `rate` is in tokens per second."""
        ...

    def close(self) -> None: ...


class Progress(AbstractContextManager):
    """Of one training; entered before its first step."""

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        path: Path | None,
        step: int,
        total: int,
        watchers: Watchers = NOBODY,
    ) -> None:
        """`configs` are in the order of the outcomes; JSON lines go to `path`. Without one, nothing is written."""
        if path:
            _forget(path, step)
        self._configs = configs
        self._path = path or Path(os.devnull)
        self._step, self._total = step, total
        self._watchers = watchers if path else NOBODY
        self._sinks = ExitStack()

    def __enter__(self) -> Self:
        batch = self._configs[0].batch
        self._bar = self._sinks.enter_context(
            tqdm(
                desc="train",
                total=self._total * batch,
                initial=self._step * batch,
                unit=" tokens",
                unit_scale=True,
            )
        )
        self._since = time.perf_counter()
        self._file = self._sinks.enter_context(self._path.open("a", encoding="utf-8"))
        outs = [config.out for config in self._configs]
        self._others: list[_Sink] = []
        if self._watchers.tensorboard:
            self._others.append(_TensorBoard(self._watchers.tensorboard, outs, self._step))
        if self._watchers.textfile:
            self._others.append(_Textfile(self._watchers.textfile, self._total))
        for sink in self._others:
            self._sinks.callback(sink.close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sinks.close()

    def update(self, step: int, outcomes: Sequence[Outcome], dead: Sequence[Tensor]) -> None:
        """After `step` steps; `dead` are the dead shares of the outcomes' members."""
        # Numbers are fetched from the device only when somebody looks.
        if self._bar.update(self._configs[0].batch) or step == self._total:
            columns = dict(
                zip(("loss", "L0", "FVU", "dead"), _columns(outcomes, dead), strict=True)
            )
            self._bar.set_postfix({name: _range(values) for name, values in columns.items()})
        if step % EVERY and step != self._total:
            return
        table = torch.stack(_columns(outcomes, dead)).T.tolist()
        rows = [
            {"out": config.out, **dict(zip(_VALUES, values, strict=True))}
            for config, values in zip(self._configs, table, strict=True)
        ]
        for row in rows:
            self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        now = time.perf_counter()
        rate = (step - self._step) * self._configs[0].batch / (now - self._since)
        self._step, self._since = step, now
        for sink in self._others:
            sink.write(step, rate, rows)


def curves(path: Path, count: int) -> list[str]:
    """What the JSON lines say of each of `count` dictionaries, in their order and without `out`; not too many lines."""
    if not path.exists():
        return [""] * count
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = []
    for member in range(count):
        own = lines[member::count]
        chosen = own[:: -(-len(own) // _CURVE_LINES) or 1]
        chosen += own[-1:] if own and chosen[-1] is not own[-1] else []
        found.append(
            "".join(
                json.dumps({k: v for k, v in line.items() if k != "out"}) + "\n" for line in chosen
            )
        )
    return found


class _TensorBoard:
    def __init__(self, folder: Path, outs: Sequence[str], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was written after the checkpoint is not shown: it comes again.
        self._writers = [
            SummaryWriter(str(folder.joinpath(*_relative(out))), purge_step=step + 1)
            for out in outs
        ]

    def write(self, step: int, rate: float, rows: Sequence[dict[str, Any]]) -> None:
        for writer, row in zip(self._writers, rows, strict=True):
            for name in _VALUES:
                writer.add_scalar(name, row[name], step)
            writer.add_scalar("tokens_per_second", rate, step)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


class _Textfile:
    def __init__(self, path: Path, total: int) -> None:
        from prometheus_client import CollectorRegistry, Gauge

        self._path = path or Path(os.devnull)
        self._registry = CollectorRegistry()
        about = {
            "step": "Steps done.",
            "steps": "Steps of the whole training.",
            "tokens_per_second": "Activations trained on per second, by each dictionary.",
        }
        self._of_all = {
            name: Gauge(f"steer_training_{name}", text, registry=self._registry)
            for name, text in about.items()
        }
        self._of_all["steps"].set(total)
        of_one = {
            "loss": "Loss of the last batch.",
            "l0": "Active features per token in the last batch.",
            "fvu": "Share of the last batch's variance that is unexplained.",
            "dead_share": "Share of features that have not been active for dead_after tokens.",
        }
        self._of_one = {
            name: Gauge(f"steer_training_{name}", text, ["dictionary"], registry=self._registry)
            for name, text in of_one.items()
        }

    def write(self, step: int, rate: float, rows: Sequence[dict[str, Any]]) -> None:
        from prometheus_client import write_to_textfile

        self._of_all["step"].set(step)
        self._of_all["tokens_per_second"].set(rate)
        for row in rows:
            for name, gauge in self._of_one.items():
                gauge.labels(row["out"]).set(row[name])
        write_to_textfile(str(self._path), self._registry)

    def close(self) -> None:
        """The file stays: its age, as node_exporter gives it, says when the training ended."""


def _columns(outcomes: Sequence[Outcome], dead: Sequence[Tensor]) -> list[Tensor]:
    """Loss, L0, FVU and dead share, of all dictionaries each."""
    parts = [[o.loss for o in outcomes], [o.l0 for o in outcomes], [o.fvu for o in outcomes]]
    return [torch.cat(values) for values in (*parts, list(dead))]


def _range(values: Tensor) -> str:
    """Over all dictionaries."""
    least, most = f"{values.min():.3g}", f"{values.max():.3g}"
    return least if least == most else f"{least}..{most}"


def _relative(out: str) -> Iterator[str]:
    return (part for part in Path(out).parts if part not in (Path(out).anchor, "..", "."))


def _forget(path: Path, step: int) -> None:
    """Takes out what was written after the checkpoint, for it will come again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A killed process may have left half a line.
        whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with whole_file(path) as fresh:
            fresh.write_text("".join(whole), encoding="utf-8")
