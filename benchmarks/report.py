"""The README's tables, from the committed results of the benchmarks.

python benchmarks/report.py          prints them
python benchmarks/report.py --write  puts them into README.md, between their markers
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"

CASES = {
    "null": "plain vLLM against itself",
    "idle": "no program",
    "edit1": "1 edit on every token",
    "edit16": "16 edits on every token",
    "readout32": "top 32 features of every token",
    "edit16_readout32": "both",
}
LOADS = {
    "batch_1": "batch 1",
    "batch_16": "batch 16",
    "prompt_1x512": "prompt of 512",
    "prompt_4x256": "4 prompts of 256",
}


def serving_overhead() -> str:
    """Speed against plain vLLM: a row a case, a column a load, for each mode that has been measured."""
    files = ("serving_overhead", "serving_overhead_compiled")
    paths = [RESULTS / f"{name}.json" for name in files]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    first = results[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    modes = ["compiled" if result["compiled"] else "eager" for result in results]
    columns = [(result, load) for result in results for load in LOADS if load in result]
    heads = [f"{modes[results.index(result)]}, {LOADS[load]}" for result, load in columns]
    lines = [
        f"Tokens/s relative to plain vLLM (float32, {first['n_features']:,} features, medians of "
        f"{first['rounds']} interleaved rounds; {first['hardware']}; {versions}; {first['date']}):",
        "",
        f"| | {' | '.join(heads)} |",
        "|---|" + "---|" * len(heads),
    ]
    for case, name in CASES.items():
        # A result may be older than a case.
        if all(case in result[load] for result, load in columns):
            cells = [f"{result[load][case]:.2f}" for result, load in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    many = [
        f"{result['batch_64']['programs64']:.2f} {mode}"
        for result, mode in zip(results, modes, strict=True)
        if "batch_64" in result
    ]
    if many:
        lines += ["", f"64 requests, each with 4 edits of its own: {', '.join(many)}."]
    return "\n".join(lines)


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
