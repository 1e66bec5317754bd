"""The README's tables, from the committed results of the benchmarks.

python benchmarks/report.py          prints them
python benchmarks/report.py --write  puts them into README.md, between their markers
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"

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


def serving_overhead() -> str:
    """Speed against plain vLLM: for each mode a table, a row a case and a column a load."""
    paths = [RESULTS / f"{name}.json" for name in ("serving_overhead", "serving_overhead_compiled")]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    return "\n\n".join(map(_overhead, results))


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


TABLES = {"serving_overhead": serving_overhead}


def filled(readme: str) -> str:
    """The README with every table between its markers made anew."""
    for name, table in TABLES.items():
        content = table()
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        readme, count = re.subn(
            pattern, lambda match, text=content: f"{match[1]}{text}\n{match[2]}", readme, flags=re.S
        )
        if count != 1:
            raise ValueError(f"README.md must have the markers of {name} once; it has {count}")
    return readme


if __name__ == "__main__":
    text = filled(README.read_text())
    if sys.argv[1:] == ["--write"]:
        README.write_text(text)
    else:
        print(text)
