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
PAGES = {"README.md": ("costs",), "benchmarks/README.md": ("serving_overhead",)}
"""Markers by page."""

CASES = {
    "null": "plain vLLM against itself",
    "serve_idle": "`vllm serve` with the plugin, no program",
    "idle": "no program",
    "edit1": "1 edit on every token",
    "edit16": "16 edits on every token",
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
            lines.append(f"| {name} | {min(shares):.1f} to {max(shares):.1f} % |")
    return "\n".join(lines)


def serving_overhead() -> str:
    """Speed against plain vLLM: for each mode a table, a row a case and a column a load."""
    return "\n\n".join(map(_overhead, _results()))


def _results() -> list[dict[str, Any]]:
    names = ("serving_overhead", "serving_overhead_compiled")
    return [json.loads((RESULTS / f"{name}.json").read_text()) for name in names]


def _overhead(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{'Compiled' if result['compiled'] else 'Eager'} (float32, {result['n_features']:,} features, medians of "
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


TABLES = {"costs": costs, "serving_overhead": serving_overhead}


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
