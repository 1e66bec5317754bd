"""Where the server's compiled code is faster than torch's on a CPU: edits row by row, and strongest features in one pass.

Both ways run in turns on caches that a pass over 120 MB has left cold, as a model's does. `edits` has rows x entries, each
row a run of its own with as many edits, which read the activation (`scale`) or do not (`add`); `strongest` has rows of
4,608 features of which some 33 are active, and asks for 32. A ratio above 1 says that the compiled code is faster;
`edit_rows.py` takes as its limits where that ends.

    python benchmarks/cpu_paths.py --json build/cpu_paths.json

`--quick` takes two rounds, to see that it runs.
"""

import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from common import circumstances, parser, publish
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.edits import AddRelative, Edit, Scale, coefficients
from steer_server.dictionary.site import Site
from steer_server.vllm_plugin.bank import Bank
from steer_server.vllm_plugin.dense_site import DensePlan
from steer_server.vllm_plugin.edit_rows import RowPlan
from steer_server.vllm_plugin.residents import Residents
from steer_server.vllm_plugin.site_edits import Entries, Run, SiteEdits
from steer_server.vllm_plugin.strongest import strongest

D_MODEL, N_FEATURES, SLOTS, K = 576, 4608, 64, 32
SITE = Site.parse("resid_post.0")
ROWS, ENTRIES = (1, 16, 64, 128, 512), (1, 16, 64)
EDITS: dict[str, Callable[[int], Edit]] = {
    "add": lambda feature: AddRelative(feature, 0.01),
    "scale": lambda feature: Scale(feature, 1.01),
}
COLD_BYTES = 120 << 20


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Microseconds of each, the median over rounds."""
    cold = torch.zeros(COLD_BYTES // 4)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            cold.add_(1)
            began = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - began)
    return {name: round(1e6 * statistics.median(t), 1) for name, t in taken.items()}


def edited(
    bank: Bank, residents: Residents, edit: Callable[[int], Edit], n_rows: int, entries: int
) -> dict[str, Callable[[], Any]]:
    slots = np.arange(entries, dtype=np.int32)
    numbers = np.array([coefficients(edit(feature)) for feature in range(entries)], np.float32).T
    always = np.full(entries, -np.inf, np.float32)
    one = Entries(np.arange(entries, dtype=np.uint32), slots, numbers, slots, always)
    edits = SiteEdits([Run(row, row, row + 1, 0, one, fresh=True) for row in range(n_rows)])
    hidden, residual = torch.randn(2, n_rows, D_MODEL)
    plans = {
        "compiled": RowPlan(edits, bank),
        "torch": DensePlan(edits, bank, residents, n_rows),
    }
    return {name: lambda p=plan: p.apply(hidden, residual) for name, plan in plans.items()}


def listed(n_rows: int) -> dict[str, Callable[[], Any]]:
    z = torch.randn(n_rows, N_FEATURES) - 2.45
    threshold = np.zeros(N_FEATURES, np.float32)
    above, limit = np.zeros(n_rows), np.full(n_rows, K)

    def by_torch() -> tuple[Tensor, NDArray, NDArray]:
        f = z.relu()
        found = f.topk(K, dim=1)
        features, values = found.indices.numpy(), found.values.numpy()
        kept = values > 0
        return torch.count_nonzero(f, dim=1), features[kept], values[kept]

    return {"compiled": lambda: strongest(z.numpy(), threshold, above, limit), "torch": by_torch}


def measured(rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    bank = Bank(SLOTS, D_MODEL, torch.device("cpu"))
    residents = Residents([SITE], [0], {0: bank}, torch.device("cpu"))
    rows = torch.nn.functional.normalize(torch.randn(N_FEATURES, D_MODEL), dim=1)
    residents.add("d", SITE, Dictionary.tied(rows, torch.full((N_FEATURES,), -0.1)))
    residents.acquire([("d", feature) for feature in range(SLOTS)])
    loads = [
        ({"what": f"edits, {kind}", "rows": n, "entries": e}, edited(bank, residents, edit, n, e))
        for kind, edit in EDITS.items()
        for n in ROWS
        for e in ENTRIES
    ] + [({"what": "strongest", "rows": n, "entries": K}, listed(n)) for n in ROWS]
    found = []
    for names, ways in tqdm(loads, unit="load"):
        us = in_turns(ways, rounds)
        found.append({**names, "us": us, "ratio": round(us["torch"] / us["compiled"], 2)})
    return found


if __name__ == "__main__":
    options = parser(__doc__, rounds=25).parse_args()
    rounds = 2 if options.quick else options.rounds
    found = {
        **circumstances(options, {name: version(name) for name in ("torch", "numba")}),
        "rounds": rounds,
        "loads": measured(rounds),
    }
    publish(options, found)
