"""The op without Triton: two dense products over the features in use, or row by row where there are few edits."""

import numpy as np
import torch
from torch import Tensor

from steer_server.dictionary.edits import Coefficients, activation_change
from steer_server.program import MAX_RELATIVE_SIZE
from steer_server.vllm_plugin.bank import Bank
from steer_server.vllm_plugin.edit_rows import RowPlan
from steer_server.vllm_plugin.residents import Residents
from steer_server.vllm_plugin.site_edits import Outcome, SiteEdits, SitePass
from steer_server.vllm_plugin.transfer import to_device


class DenseSite:
    """One site, told before each pass what it is to do."""

    def __init__(self, bank: Bank, residents: Residents) -> None:
        self._bank = bank
        self._residents = residents
        self._edits: SiteEdits | None = None
        self._plan: RowPlan | DensePlan | None = None
        self._before = self._after = False
        self._n_rows = 0
        self._pass = SitePass()

    def prepare(self, edits: SiteEdits | None, before: bool, after: bool, n_rows: int) -> None:
        """From now on passes have `n_rows` rows; x is kept before and after the edits where that is asked for."""
        self._edits, self._plan = edits, None
        self._before, self._after, self._n_rows = before, after, n_rows

    def begin(self) -> None:
        """A pass is coming."""
        self._pass = SitePass()

    def run(self, hidden: Tensor, residual: Tensor | None) -> None:
        """The op's body. Rows past the step's own are padding and left alone."""
        if self._edits is None and not self._before and not self._after:
            return
        if hidden.shape[0] > self._n_rows:
            hidden = hidden[: self._n_rows]
            residual = None if residual is None else residual[: self._n_rows]
        if self._before:
            self._pass.before = _stream(hidden, residual)
        if self._edits is not None:
            self._plan = self._plan or self._ready(self._edits, hidden, residual)
            self._pass.outcome = self._plan.apply(hidden, residual)
        if self._after:
            self._pass.after = _stream(hidden, residual)

    def end(self) -> SitePass:
        """What the pass left."""
        return self._pass

    def _ready(
        self, edits: SiteEdits, hidden: Tensor, residual: Tensor | None
    ) -> "RowPlan | DensePlan":
        if RowPlan.suits(edits, self._bank, self._residents, hidden, residual):
            return RowPlan(edits, self._bank)
        return DensePlan(edits, self._bank, self._residents, len(hidden))


class DensePlan:
    """`SiteEdits` ready to run.

    Each row has its own coefficients; a row without a program is not touched at all. Where a row's program leaves a
    feature of its neighbours alone, that feature's part of its delta is an exact 0.
    """

    def __init__(self, edits: SiteEdits, bank: Bank, residents: Residents, n_rows: int) -> None:
        lines = edits.lines
        self._conditional = any(entries.conditional for entries in edits.distinct)
        self._limited = any(entries.limiting for entries in edits.distinct)
        self._shared = any(entries.relative for entries in edits.distinct)
        self._reads = any(entries.reads for entries in edits.distinct)
        # In a decoding batch most requests often edit the same features: then nothing needs to be gathered.
        self._uniform = not self._conditional and bool((lines.slot == lines.slot[0]).all())
        slots = lines.slot[0] if self._uniform else np.unique([lines.slot, lines.when_slot])
        device = bank.decoder_norm.device
        self._features, self._norms = bank.at(slots)
        self._rectified = bool((self._features.threshold == 0).all())
        self._rows: slice | Tensor | None
        if isinstance(edits.rows, slice):
            self._rows = None if edits.rows == slice(0, n_rows) else edits.rows
        else:
            self._rows = edits.rows.to(device)
        line = (
            edits.line_of_row if (lines.numbers != lines.numbers[:, :1]).any() else np.zeros(1, int)
        )
        table = Coefficients(*torch.from_numpy(lines.numbers[:, line]).to(device))
        if not self._uniform:
            place = np.searchsorted(slots, lines.slot)[edits.line_of_row]
            self._column = torch.from_numpy(place).to(device)
            self._norms = self._norms[self._column]
        self._table = table._replace(share=table.share / self._norms)
        if self._conditional:
            place = np.searchsorted(slots, lines.when_slot)[edits.line_of_row]
            self._when = torch.from_numpy(place).to(device)
            above = lines.when_above[edits.line_of_row]
            self._above = torch.from_numpy(above).to(device)
        # A number of Python's costs more at each step, being made a tensor, than the arithmetic it is for.
        self._most = torch.tensor(MAX_RELATIVE_SIZE, device=device)
        self._nothing = torch.tensor(0.0, device=device)
        self._bounds: Tensor | None = None
        if lines.bounds is not None:
            self._bounds = torch.from_numpy(lines.bounds[:, edits.line_of_row, None]).to(device)
        self._slots = len(slots)
        self._chosen = _chosen_by_rank(slots, bank, residents)

    def apply(self, hidden: Tensor, residual: Tensor | None) -> Outcome[Tensor]:
        """Adds the edits' delta to `hidden`; x is the sum of both, where there are two."""
        x = self._of(_stream(hidden, residual))
        x_norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        change = self._change(x, x_norm)
        spread = change
        if not self._uniform:
            spread = x.new_zeros(len(x), self._slots).scatter_add_(1, self._column, change)
        delta = spread @ self._features.decoder
        size = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
        if self._bounds is None:
            whole, applied = None, size <= x_norm * self._most
        else:
            _, most, refused = self._bounds
            whole = size
            scale = torch.where(size > most * x_norm, most * x_norm / size, 1.0)
            delta, applied = delta * scale, size * scale <= refused * x_norm
        if hidden.dtype == torch.float32:
            self._add(hidden, torch.where(applied, delta, self._nothing))
        else:
            mine = self._of(hidden)
            # Rounded once; only float16 can overflow where the bound above holds.
            edited = (mine.float() + delta).to(hidden.dtype)
            applied &= edited.isfinite().all(dim=-1, keepdim=True)
            hidden[slice(None) if self._rows is None else self._rows] = torch.where(
                applied, edited, mine
            )
        return Outcome(change, x_norm, self._norms, applied, whole)

    def _change(self, x: Tensor, x_norm: Tensor) -> Tensor:
        """f' - f, [rows, entries]."""
        f = own = self._encode(x) if self._reads else None
        if f is not None and not self._uniform:
            own = f.gather(1, self._column)
        change = activation_change(
            own, x_norm, self._table, shared=self._shared, limited=self._limited
        )
        if self._conditional:
            assert f is not None
            change = torch.where(f.gather(1, self._when) > self._above, change, self._nothing)
        return change

    def _encode(self, x: Tensor) -> Tensor:
        """The activations of the features in use."""
        f = self._features.encode(x, rectified=self._rectified)
        for resident, columns, features in self._chosen:
            f[:, columns] = resident.encode_by_rank(x, features)
        return f

    def _of(self, batch: Tensor) -> Tensor:
        """The rows with edits."""
        # A slice of all is a call, too.
        if self._rows is None:
            return batch
        rows = self._rows
        return batch[rows] if isinstance(rows, slice) else batch.index_select(0, rows)

    def _add(self, hidden: Tensor, delta: Tensor) -> None:
        if isinstance(self._rows, Tensor):
            hidden.index_add_(0, self._rows, delta)
        else:
            self._of(hidden).add_(delta)


def _chosen_by_rank(slots: np.ndarray, bank: Bank, residents: Residents):
    """Where features of TopK dictionaries stand among `slots`: active only if among the k largest of all."""
    found = {}
    for column, slot in enumerate(slots.tolist()):
        name, feature = bank.slots.owner[slot]
        if residents[name].k:
            columns, features = found.setdefault(name, ([], []))
            columns.append(column)
            features.append(feature)
    device = bank.decoder_norm.device
    return [
        (residents[name], columns, to_device(np.array(features), device))
        for name, (columns, features) in found.items()
    ]


def _stream(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """x in float32, apart from the model's own memory."""
    if residual is not None:
        return hidden.float() + residual.float()
    return hidden.float() if hidden.dtype != torch.float32 else hidden.clone()
