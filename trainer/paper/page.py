"""The report's page: sections with the paper's claim, our verdict, tables and figures, in one file of HTML."""

import io
from collections.abc import Callable, Sequence
from enum import StrEnum
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from trainer.compare import Table
from trainer.errors import BadConfig
from trainer.files import whole_file


class Verdict(StrEnum):
    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    DIFFERS = "differs"
    NOT_MEASURED = "not measured"


class Figure(NamedTuple):
    svg: str
    caption: str


class Finding(NamedTuple):
    """One claim of the paper beside what we measured."""

    title: str
    claim: str
    """The paper's, in words, with its section or figure."""
    verdict: Verdict
    because: str
    """Numbers that the verdict rests on, and what differs from the paper's protocol."""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


class Section(NamedTuple):
    title: str
    about: str
    """What was done, with which models and constants."""
    findings: Sequence[Finding]


def plot(draw: Callable[[Any], None], caption: str, size: tuple[float, float] = (8, 5)) -> Figure:
    """A figure that `draw` fills; it gets matplotlib's Figure."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise BadConfig("plots need matplotlib: pip install matplotlib") from error
    canvas = Canvas(figsize=size, layout="constrained")
    draw(canvas)
    text = io.StringIO()
    canvas.savefig(text, format="svg")
    svg = text.getvalue()
    return Figure(svg[svg.index("<svg") :], caption)


def write_page(title: str, about: str, sections: Sequence[Section], path: Path) -> None:
    """One file of HTML that needs no other, and beside it the same without figures as Markdown."""
    body = "\n".join(_section(section, number) for number, section in enumerate(sections, 1))
    verdicts = Table(
        ["section", "claim", "verdict"],
        [[s.title, f.title, f.verdict] for s in sections for f in s.findings],
    )
    page = _PAGE.format(
        title=escape(title), about=escape(about), overview=verdicts.html(), body=body
    )
    parts = [f"# {title}", about, verdicts.markdown(), *map(_section_markdown, sections)]
    for file, text in ((path, page), (path.with_suffix(".md"), "\n\n".join(parts) + "\n")):
        with whole_file(file) as fresh:
            fresh.write_text(text, encoding="utf-8")


def _section(section: Section, number: int) -> str:
    findings = "\n".join(_finding(finding) for finding in section.findings)
    return f"<h2>{number}. {escape(section.title)}</h2>\n<p>{escape(section.about)}</p>\n{findings}"


def _finding(finding: Finding) -> str:
    figures = "\n".join(
        f"<figure>{figure.svg}<figcaption>{escape(figure.caption)}</figcaption></figure>"
        for figure in finding.figures
    )
    tables = "\n".join(table.html() for table in finding.tables)
    kind = finding.verdict.replace(" ", "-")
    return (
        f'<h3>{escape(finding.title)} <span class="verdict {kind}">{finding.verdict}</span></h3>\n'
        f"<p><b>The paper:</b> {escape(finding.claim)}</p>\n"
        f"<p><b>Here:</b> {escape(finding.because)}</p>\n{figures}\n{tables}"
    )


def _section_markdown(section: Section) -> str:
    parts = [f"## {section.title}", section.about]
    for finding in section.findings:
        parts += [f"### {finding.title}: {finding.verdict}", f"**The paper:** {finding.claim}"]
        parts += [f"**Here:** {finding.because}", *(table.markdown() for table in finding.tables)]
    return "\n\n".join(parts)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; }}
table {{ border-collapse: collapse; margin: 1em 0 2em; font-size: 13px; }}
th, td {{ border-bottom: 1px solid #ccc; padding: 0.2em 0.8em; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 1em 0; }}
figcaption {{ color: #444; font-size: 13px; }}
svg {{ max-width: 100%; height: auto; }}
.verdict {{ border-radius: 0.3em; color: #fff; font-size: 13px; padding: 0.1em 0.6em; }}
.reproduced {{ background: #2a7d2a; }}
.not-reproduced {{ background: #a33; }}
.differs {{ background: #a67c00; }}
.not-measured {{ background: #777; }}
</style>
<h1>{title}</h1>
<p>{about}</p>
{overview}
{body}
</html>
"""
