"""A report as a page and as Markdown, from its content."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from zipformer_crctc.bootstrap import NUM_SETS, Interval
from zipformer_crctc.breakdown import GroupRow, by_feature, by_group, by_phone, confusions, total
from zipformer_crctc.charts import SYSTEM_COLOURS
from zipformer_crctc.comparison import Comparison, compare_languages
from zipformer_crctc.metrics import ErrorCounts
from zipformer_crctc.reportcontent import Report
from zipformer_crctc.reportpage import (
    ERROR_KEY,
    Section,
    ShownUtterance,
    bullets,
    confusion_map,
    confusion_table,
    feature_bars,
    folded,
    legend,
    page,
    paragraph,
    rate_bars,
    utterance_view,
    verdict,
)
from zipformer_crctc.reporttables import (
    Table,
    comparison_table,
    feature_table,
    group_table,
    markdown,
    p_value,
    phone_table,
)
from zipformer_crctc.scoring import RATES

_MOST_ROWS = 300  # of a table that nobody reads to its end, such as that of speakers


def html_text(report: Report) -> str:
    """The page."""
    sections = [_summary(report)]
    if any(scored.results for scored in report.sets):
        sections += [_languages(report), _phones(report), _confusions(report), _features(report), _others(report)]
        sections += [
            Section(f"utterances-{number}", title, _utterances(report, shown))
            for number, (title, shown) in enumerate(report.utterances.items())
        ]
    return page(f"Phone recognition: {report.title}", "", sections)


def _summary(report: Report) -> Section:
    if not any(scored.results for scored in report.sets):
        return Section(
            "summary", "Summary", paragraph("No utterance has a reference: nothing is scored.") + bullets(report.notes)
        )
    parts = [_totals(report).html()]
    if report.comparison is not None:
        parts.append(paragraph(verdict(report.comparison, report.names)))
        parts.append(comparison_table(report.comparison, (report.names[0], report.names[1])).html())
    corpora = {corpus for scored in report.sets for corpus in scored.corpora}
    if len(corpora) > 1:
        parts.append("<h3>By test set</h3>")
        parts += [table.html() for table in _group_tables(report, "corpus", "test set")]
    parts.append(paragraph(_explanation(report), "note"))
    parts.append(bullets(report.notes))
    return Section("summary", "Summary", "".join(parts))


def _explanation(report: Report) -> str:
    return (
        "PER: phone errors per reference phone. PFER: feature edit distance over panphon's segments; the mean is over "
        "utterances and not normalised, the percentage is per reference segment. In brackets: 95 % intervals from "
        f"{NUM_SETS} resampled sets of utterances (seed {report.seed}). Phones are aligned with the fewest errors, "
        "like with like; other alignments with as few errors may split them differently into substitutions, deletions "
        "and insertions."
    )


def _totals(report: Report) -> Table:
    rows = [
        replace(total(scored, report.seed), group=name) for name, scored in zip(report.names, report.sets, strict=True)
    ]
    return group_table("system", rows)


def _group_tables(report: Report, kind: str, title: str) -> list[Table]:
    """A table for each system."""
    named = report.names if len(report.names) > 1 else [""]
    return [group_table(title, _most(_groups(report, kind)[place]), name) for place, name in enumerate(named)]


def _groups(report: Report, kind: str) -> list[list[GroupRow]]:
    return [by_group(scored, kind, report.seed) for scored in report.sets]


def _most(rows: list[GroupRow]) -> list[GroupRow]:
    """The rows, or those with most errors where there are too many, with one for the rest."""
    if len(rows) <= _MOST_ROWS:
        return rows
    ordered = sorted(rows, key=lambda row: -row.counts.errors)
    rest = ordered[_MOST_ROWS:]
    counts = sum((row.counts for row in rest), ErrorCounts())
    name = f"{len(rest)} more with fewer errors"
    num_utterances = sum(row.utterances for row in rest)
    # PFER of several groups is not in their rows; only counts add up.
    last = GroupRow(name, num_utterances, counts, (counts.per, math.nan, math.nan), 3 * (Interval(),))
    return [*ordered[:_MOST_ROWS], last]


def _languages(report: Report) -> Section:
    groups = _groups(report, "language")
    parts = [_system_legend(report)]
    parts += [rate_bars(groups, rate, RATES[rate]) for rate in (0, 2)]
    named = report.names if len(report.names) > 1 else [""]
    tables = [group_table("language", rows, name).html() for rows, name in zip(groups, named, strict=True)]
    if report.comparison is not None:
        tables.append(_language_differences(report, report.comparison).html())
    return Section("languages", "Languages", "".join([*parts, folded("Table of languages", "".join(tables))]))


def _language_differences(report: Report, comparison: Comparison) -> Table:
    """PER of B less that of A by language."""
    found = compare_languages(report.sets[0], report.sets[1], comparison, report.seed)
    rows = []
    for language, differences in found.items():
        change = differences[0]
        spread = f" [{change.interval.low:+.2f}, {change.interval.high:+.2f}]" if change.interval.known else ""
        rows.append([language or "(none)", f"{change.value:+.2f}{spread}", p_value(change.p_value)])
    return Table(["language", "PER difference [95 %]", "p"], rows)


def _system_legend(report: Report) -> str:
    return legend(report.names, SYSTEM_COLOURS) if len(report.names) > 1 else ""


def _phones(report: Report) -> Section:
    explanation = (
        "PER counts phones of the tokenizer, PFER panphon's segments, so a segment such as kʰ and its parts stand in "
        "rows of their own. An inserted phone counts for its own row. Phones with most errors come first."
    )
    parts = [paragraph(explanation, "note")]
    for name, scored in zip(report.names, report.sets, strict=True):
        rows = by_phone(scored, report.seed)
        parts.append(folded(f"{name}: {len(rows)} phones", phone_table(rows).html()))
    return Section("phones", "Phones", "".join(parts))


def _confusions(report: Report) -> Section:
    parts = []
    for name, scored in zip(report.names, report.sets, strict=True):
        counts = confusions(scored)
        heading = paragraph(name) if len(report.names) > 1 else ""
        parts.append(heading + confusion_map(counts) + folded("Most frequent errors", confusion_table(counts).html()))
    return Section("confusions", "Confusions", "".join(parts))


def _features(report: Report) -> Section:
    systems = [by_feature(scored) for scored in report.sets]
    explanation = (
        "Segments are aligned with the smallest feature distance; a feature is wrong where the reference has + or - "
        "and the hypothesis another value. Deleted and inserted segments do not count."
    )
    tables = [
        folded(f"Table: {name}", feature_table(rows).html()) for name, rows in zip(report.names, systems, strict=True)
    ]
    html = paragraph(explanation, "note") + _system_legend(report) + feature_bars(systems) + "".join(tables)
    return Section("features", "Articulatory features", html)


def _others(report: Report) -> Section:
    tables = "".join(table.html() for table in _group_tables(report, "speaker", "speaker"))
    return Section("speakers", "Speakers", folded("Table of speakers", tables))


def _utterances(report: Report, shown: Sequence[ShownUtterance]) -> str:
    if not shown:
        return paragraph("None.")
    named = ""
    if len(report.names) > 1:
        named = paragraph(
            "; ".join(f"{letter}: {name}" for letter, name in zip("AB", report.names, strict=True)), "note"
        )
    return ERROR_KEY + named + "".join(utterance_view(one) for one in shown)


def markdown_text(report: Report) -> str:
    """The tables."""
    parts = [f"# Phone recognition: {markdown(report.title)}"]
    if any(scored.results for scored in report.sets):
        parts += [_totals(report).markdown()]
        if report.comparison is not None:
            parts.append(markdown(verdict(report.comparison, report.names)))
            parts.append(comparison_table(report.comparison, (report.names[0], report.names[1])).markdown())
        for kind, title in (("corpus", "test set"), ("language", "language")):
            parts.append(f"## By {title}")
            parts += [table.markdown() for table in _group_tables(report, kind, title)]
        parts.append("## By articulatory feature")
        for name, scored in zip(report.names, report.sets, strict=True):
            parts += [markdown(name)] if len(report.names) > 1 else []
            parts.append(feature_table(by_feature(scored)).markdown())
        parts.append(_explanation(report))
    else:
        parts.append("No utterance has a reference: nothing is scored.")
    return "\n\n".join([*parts, *(f"- {markdown(note)}" for note in report.notes)]) + "\n"
