"""A report as a page and as Markdown, from its content."""

from __future__ import annotations

import math
from dataclasses import replace
from html import escape

from zipformer_crctc.bootstrap import NUM_SETS, Interval
from zipformer_crctc.breakdown import NONE, GroupRow, by_feature, by_group, by_phone, confusions, total
from zipformer_crctc.metrics import ErrorCounts
from zipformer_crctc.reportcontent import Report
from zipformer_crctc.reportfigures import (
    confused_phones,
    confusion_map,
    confusion_table,
    feature_bars,
    legend,
    rate_bars,
)
from zipformer_crctc.reportpage import Section, bullets, folded, page, paragraph
from zipformer_crctc.reporttables import (
    Table,
    comparison_table,
    feature_table,
    group_table,
    language_comparison_table,
    markdown,
    phone_table,
    verdict,
)
from zipformer_crctc.reportutterances import utterance_sections
from zipformer_crctc.scoring import RATES

_MOST_ROWS = 300  # of a table that nobody reads to its end, such as that of speakers
_NOTHING = "No utterance has a reference: nothing is scored."
_FEATURES = (
    "Segments are aligned with the smallest feature distance; a feature is wrong where the reference has + or - and "
    "the hypothesis another value. Deleted and inserted segments do not count."
)


def html_text(report: Report) -> str:
    """The page."""
    if not report.scored:
        return page(report.title, [Section("summary", "Summary", paragraph(_NOTHING) + bullets(report.notes))])
    sections = [_summary(report), _languages(report), _phones(report), _confusions(report), _features(report)]
    speakers = _group_tables(report, "speaker", "speaker")
    if speakers:
        tables = "".join(table.html("speakers") for table in speakers)
        sections.append(Section("speakers", "Speakers", folded("Table of speakers", tables)))
    return page(report.title, [*sections, *utterance_sections(report.utterances, report.clips, report.names)])


def _summary(report: Report) -> Section:
    parts = []
    if report.comparison is not None:
        parts.append(paragraph(verdict(report.comparison, report.names), "verdict"))
        parts.append(comparison_table(report.comparison.total, report.names).html("comparison"))
    parts.append(_totals(report).html("totals"))
    if tables := _group_tables(report, "corpus", "test set"):
        parts.append("<h3>By test set</h3>")
        parts += [table.html("test sets") for table in tables]
    parts.append(paragraph(_explanation(report), "note"))
    parts.append(bullets(report.notes))
    return Section("summary", "Summary", "".join(parts))


def _explanation(report: Report) -> str:
    return (
        "PER: phone errors per reference phone. PFER: feature edit distance over panphon's segments; the mean is over "
        "utterances and not normalised, the percentage is per reference segment. In brackets: 95 % intervals from "
        f"{NUM_SETS} resampled sets of utterances (seed {report.seed}); those of a handful of utterances are too "
        "narrow. Phones are aligned with the fewest errors, like with like; other alignments with as few errors may "
        "split them differently into substitutions, deletions and insertions."
    )


def _totals(report: Report) -> Table:
    rows = [
        replace(total(scored, report.seed), group=name) for name, scored in zip(report.names, report.sets, strict=True)
    ]
    return group_table("system", rows)


def _group_tables(report: Report, kind: str, title: str) -> list[Table]:
    """A table for each system; none where there is only one group, which the totals tell already."""
    groups = _groups(report, kind)
    if len({row.group for rows in groups for row in rows}) < 2:
        return []
    named = report.names if len(report.names) > 1 else [""]
    return [group_table(title, _most(rows), name) for rows, name in zip(groups, named, strict=True)]


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
    if {row.group for rows in groups for row in rows} == {NONE}:
        return Section("languages", "Languages", paragraph("No utterance names its language."))
    charts = [rate_bars(groups, rate, RATES[rate]) for rate in (0, 2)]
    tables = [table.html("languages") for table in _language_tables(report)]
    html = _system_legend(report) + "".join(charts) + folded("Table of languages", "".join(tables))
    return Section("languages", "Languages", html)


def _language_tables(report: Report) -> list[Table]:
    tables = _group_tables(report, "language", "language")
    if report.comparison is not None and tables:
        tables.insert(0, language_comparison_table(report.comparison.languages, report.names))
    return tables


def _system_legend(report: Report) -> str:
    return legend(report.names) if len(report.names) > 1 else ""


def _phones(report: Report) -> Section:
    explanation = (
        "PER counts phones of the tokenizer, PFER panphon's segments, so a segment such as kʰ and its parts stand in "
        "rows of their own. An inserted phone counts for its own row. Phones with most errors come first."
    )
    parts = [paragraph(explanation, "note")]
    for name, scored in zip(report.names, report.sets, strict=True):
        rows = by_phone(scored, report.seed)
        parts.append(folded(f"{name}: {len(rows)} phones", phone_table(rows).html(f"phones, {name}")))
    return Section("phones", "Phones", "".join(parts))


def _confusions(report: Report) -> Section:
    explanation = (
        "Figures are percent of the reference phone (in the last row: of the hypothesis phone); grey is correct, red "
        "an error. Phones are in the order of their features, so that like ones are neighbours."
    )
    systems = [confusions(scored) for scored in report.sets]
    chosen = confused_phones(systems)
    parts = [paragraph(explanation, "note")]
    for name, counts in zip(report.names, systems, strict=True):
        parts.append(f"<h3>{escape(name)}</h3>" if len(systems) > 1 else "")
        parts.append(confusion_map(counts, chosen, f"confusions, {name}"))
        parts.append(folded("Most frequent errors", confusion_table(counts).html(f"most frequent errors, {name}")))
    return Section("confusions", "Confusions", "".join(parts))


def _features(report: Report) -> Section:
    systems = [by_feature(scored) for scored in report.sets]
    tables = [
        folded(f"Table: {name}", feature_table(rows).html(f"features, {name}"))
        for name, rows in zip(report.names, systems, strict=True)
    ]
    html = paragraph(_FEATURES, "note") + _system_legend(report) + feature_bars(systems) + "".join(tables)
    return Section("features", "Features", html)


def markdown_text(report: Report) -> str:
    """The tables."""
    parts = [f"# {markdown(report.title)}"]
    if not report.scored:
        parts.append(_NOTHING)
    else:
        if report.comparison is not None:
            parts.append(markdown(verdict(report.comparison, report.names)))
            parts.append(comparison_table(report.comparison.total, report.names).markdown())
        parts.append(_totals(report).markdown())
        for title, tables in (
            ("test set", _group_tables(report, "corpus", "test set")),
            ("language", _language_tables(report)),
        ):
            parts += [f"## By {title}"] if tables else []
            parts += [table.markdown() for table in tables]
        parts.append(f"## By articulatory feature\n\n{_FEATURES}")
        for name, scored in zip(report.names, report.sets, strict=True):
            parts += [markdown(name)] if len(report.names) > 1 else []
            parts.append(feature_table(by_feature(scored)).markdown())
        parts.append(_explanation(report))
    notes = "\n".join(f"- {markdown(note)}" for note in report.notes)
    return "\n\n".join([*parts, notes]).rstrip() + "\n"
