"""What the pages say of speed, from the committed results of the benchmarks.

python benchmarks/report.py          prints it
python benchmarks/report.py --write  puts it into README.md and benchmarks/README.md, between its markers
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {
    "README.md": ("costs",),
    "benchmarks/README.md": (
        "serving_overhead",
        "cpu_paths",
        "api_overhead",
        "trainer_throughput",
        "trainer_profile",
        "trainer_end_to_end",
        "trainer_quality",
    ),
}
"""Markers by page."""

CASES = {
    "null": "plain vLLM against itself",
    "serve_idle": "`vllm serve` with the plugin, no program",
    "idle": "no program",
    "edit1": "1 edit on every token",
    "edit16": "16 edits on every token",
    "scale16": "the same, by the features' activations",
    "readout32": "top 32 features of every token",
    "edit16_readout32": "both",
    "programs64": "4 edits, other ones for each request",
}
LOADS = {
    "batch_1": "batch 1",
    "batch_16": "batch 16",
    "prompt_1x512": "prompt of 512",
    "prompt_16x32": "16 prompts of 32",
    "batch_64": "batch 64",
}

TRAINER_CASES = {
    "top_k": "TopK, 4,608 features",
    "batch_top_k": "BatchTopK, 4,608",
    "wide": "TopK, 16,384",
    "sweep": "16 L1 dictionaries of 1,152",
}
API_ARMS = {
    "steer": "steer's gRPC",
    "readout": "with the top 32 features of every token",
    "null": "vLLM's server against itself",
}
LATENCIES = {"first token": "first", "between tokens": "between"}
_UNMEASURED = "No run is committed yet."


def costs() -> str:
    """The share of time in which steer's own code ran, over all loads and modes."""
    results = _results()
    lines = ["| | steer's own share of the time |", "|---|---|"]
    for case, name in CASES.items():
        shares = [
            100 * (1 - result[load]["without_own_time"][case])
            for result in results
            for load in LOADS
            if case in result[load]["without_own_time"]
        ]
        if shares:
            ends = dict.fromkeys(f"{share:.1f}" for share in (min(shares), max(shares)))
            lines.append(f"| {name} | {' to '.join(ends)} % |")
    return "\n".join(lines)


def serving_overhead() -> str:
    """Speed against plain vLLM: for each mode a table, a row a case and a column a load."""
    return "\n\n".join(map(_overhead, _results()))


def cpu_paths() -> str:
    """How many times as long torch takes as compiled code, a row a task and a column a number of rows."""
    path = RESULTS / "cpu_paths.json"
    if not path.exists():
        return _UNMEASURED
    result = json.loads(path.read_text())
    cells: dict[str, dict[int, str]] = {}
    for load in result["loads"]:
        line = cells.setdefault(f"{load['what']}, {load['entries']}", {})
        line[load["rows"]] = f"{load['ratio']:.2f} ({load['us']['compiled']:.0f} µs)"
    columns = sorted({load["rows"] for load in result["loads"]})
    heads = ["1 row" if n == 1 else f"{n} rows" for n in columns]
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"Medians of {result['rounds']} rounds; {result['hardware']}; {packages}; {result['date']}:",
        "",
        f"| | {' | '.join(heads)} |",
        "|---|" + "---|" * len(columns),
    ]
    for name, line in cells.items():
        lines.append(f"| {name} | {' | '.join(line[n] for n in columns)} |")
    return "\n".join(lines)


def api_overhead() -> str:
    """Latency of our gRPC over that of vLLM's own server, a row an arm and a column a load."""
    path = RESULTS / "api_overhead.json"
    if not path.exists():
        return _UNMEASURED
    result = json.loads(path.read_text())
    loads = result["loads"]
    columns = [
        f"{load['streams']} stream{'s' * (load['streams'] > 1)}, {name}"
        for load in loads
        for name in (*LATENCIES, "server's CPU")
    ]
    lines = [
        f"{_mode(result)}, prompts of {result['prompt_tokens']} tokens, medians of "
        f"{result['rounds']} interleaved rounds; {result['hardware']}; vllm {result['versions']['vllm']}; "
        f"{result['date']}:",
        "",
        f"| | {' | '.join(columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for arm, title in API_ARMS.items():
        cells = [cell for load in loads for cell in _latencies(load, arm)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    times = [
        cell
        for load in loads
        for cell in (
            *(f"{load[key]['vllm_ms']:.0f} ms" for key in LATENCIES.values()),
            f"{load['cpu']['vllm']:.0f} µs",
        )
    ]
    lines.append(f"| vLLM's server | {' | '.join(times)} |")
    return "\n".join(lines)


def _latencies(load: dict[str, Any], arm: str) -> list[str]:
    """Cells of one arm, as ratios to vLLM's server."""
    cells = [
        f"{load[key][arm]['ratio']:.2f} ({load[key][arm]['spread'][0]:.2f} to {load[key][arm]['spread'][1]:.2f})"
        for key in LATENCIES.values()
    ]
    return [*cells, f"{load['cpu'][arm] / load['cpu']['vllm']:.2f}"]


def trainer_throughput() -> str:
    """How many times as long as ours the other trainers take, a row a trainer and a column a case."""
    path = RESULTS / "trainer_throughput.json"
    if not path.exists():
        return _UNMEASURED
    result = json.loads(path.read_text())
    cases = {name: title for name, title in TRAINER_CASES.items() if name in result["cases"]}
    rows: dict[str, dict[str, str]] = {}
    for case in cases:
        for name, found in result["cases"][case]["contestants"].items():
            rows.setdefault(_trainer(name, found["title"]), {})[case] = _speed(found)
    lines = [
        f"Batches of {result['batch']:,}, float32, {result['threads']} threads, medians of {result['rounds']} "
        f"interleaved rounds; {result['hardware']}; torch {result['versions']['torch']}; {result['date']}:",
        "",
        f"| | {' | '.join(cases.values())} |",
        "|---|" + "---|" * len(cases),
    ]
    lines += [
        f"| {row} | {' | '.join(cells.get(case, '') for case in cases)} |"
        for row, cells in rows.items()
    ]
    return "\n".join(lines)


def trainer_profile() -> str:
    """What our step is made of and how far it is from its floor, a row a case."""
    path = RESULTS / "trainer_profile.json"
    if not path.exists():
        return _UNMEASURED
    result = json.loads(path.read_text())
    lines = [
        f"Batches of {result['batch']:,}, {result['threads']} threads, peak {result['peak_gflop_per_second']:.0f} GFLOP/s; "
        f"{result['hardware']}; torch {result['versions']['torch']}; {result['date']}:",
        "",
        "| | step | floor | wide products | products over active features | all else | wide products only, over the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, found in result["cases"].items():
        parts = found["parts_ms"]
        times = (found["ms"], found["floor_ms"], parts["products"], parts["sparse"], parts["rest"])
        cells = [f"{ms:,.0f} ms" for ms in times]
        lines.append(
            f"| {TRAINER_CASES[case]} | {' | '.join(cells)} | {found['ideal_ratio']:.2f} |"
        )
    return "\n".join(lines)


def _trainer(name: str, title: str) -> str:
    return " ".join([title, *name.split()[1:]])


def _speed(found: dict[str, Any]) -> str:
    if "gflop_per_second" in found:
        return f"{found['ms']:,.0f} ms, {found['gflop_per_second']:,.0f} GFLOP/s"
    ratio = found["ratio"]
    share = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
    return f"{found['ms']:,.0f} ms" if ratio["min"] == ratio["max"] == 1 else share


def trainer_end_to_end() -> str:
    """How many times as long as ours the other trainers take with the model included."""
    path = RESULTS / "trainer_end_to_end.json"
    if not path.exists():
        return _UNMEASURED
    result = json.loads(path.read_text())
    lines = [
        f"{result['model']}, {result['tokens']:,} tokens, batches of {result['batch']:,}, {result['threads']} threads, "
        f"medians of {result['rounds']} interleaved rounds; {result['hardware']}; torch {result['versions']['torch']}; "
        f"{result['date']}:",
        "",
        "| | tokens/s | time, of ours |",
        "|---|---|---|",
    ]
    for name, found in result["contestants"].items():
        ratio = found["ratio"]
        times = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        lines.append(f"| {name} | {found['tokens_per_second']:,.0f} | {times} |")
    return "\n".join(lines)


def trainer_quality() -> str:
    """Dictionaries of all trainers on held-out text, at the same L0."""
    path = RESULTS / "trainer_quality.json"
    if not path.exists():
        return _UNMEASURED
    result = json.loads(path.read_text())
    lines = [
        f"{result['model']} at {result['site']}, {result['tokens']:,} tokens, {result['n_features']:,} features, "
        f"k = {result['k']}, batches of {result['batch']:,}; {result['date']}:",
        "",
        "| | L0 | FVU | delta-CE | active on no token |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {found['title']}, {found['architecture']} | {found['l0']:.1f} | {found['fvu']:.3f} | "
        f"{found['delta_ce']:.3f} | {found['dead_share']:.1%} |"
        for found in result["dictionaries"]
    ]
    return "\n".join(lines)


def _results() -> list[dict[str, Any]]:
    names = ("serving_overhead", "serving_overhead_compiled")
    return [json.loads((RESULTS / f"{name}.json").read_text()) for name in names]


def _mode(result: dict[str, Any]) -> str:
    return "Compiled" if result["compiled"] else "Eager"


def _overhead(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{_mode(result)} (float32, {result['n_features']:,} features, medians of "
        f"{result['rounds']} interleaved rounds; {result['hardware']}; {versions}; {result['date']}):",
        "",
        f"| | {' | '.join(LOADS.values())} |",
        "|---|" + "---|" * len(LOADS),
    ]
    for case, name in CASES.items():
        cells = [_cell(result[load], case) for load in LOADS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: dict[str, Any], case: str) -> str:
    if case not in found["ratios"]:
        return ""
    own = found["without_own_time"].get(case)
    return f"{found['ratios'][case]:.2f}" + ("" if own is None else f" / {own:.3f}")


TABLES = {
    "costs": costs,
    "serving_overhead": serving_overhead,
    "cpu_paths": cpu_paths,
    "api_overhead": api_overhead,
    "trainer_throughput": trainer_throughput,
    "trainer_profile": trainer_profile,
    "trainer_end_to_end": trainer_end_to_end,
    "trainer_quality": trainer_quality,
}


def filled(page: str) -> str:
    """The page's text with every table between its markers made anew."""
    text = (ROOT / page).read_text()
    for name in PAGES[page]:
        content = TABLES[name]()
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(
            pattern, lambda match, table=content: f"{match[1]}{table}\n{match[2]}", text, flags=re.S
        )
        if count != 1:
            raise ValueError(f"{page} must have the markers of {name} once; it has {count}")
    return text


if __name__ == "__main__":
    for page in PAGES:
        text = filled(page)
        if sys.argv[1:] == ["--write"]:
            (ROOT / page).write_text(text)
        else:
            print(text)
