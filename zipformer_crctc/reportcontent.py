"""What a report shows: scored systems, their comparison, the utterances to look at, and notes on what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

from zipformer_crctc.comparison import Comparison, compare
from zipformer_crctc.metrics import count_errors
from zipformer_crctc.reportdata import Clip, System, read_clips
from zipformer_crctc.reportutterances import ShownUtterance
from zipformer_crctc.scoring import ScoredSet, score_set
from zipformer_crctc.text import name_symbols

_NAMES_LISTED = 20


@dataclass(frozen=True)
class Report:
    """All that the page and the Markdown show."""

    names: list[str]
    """One system, or A and B."""
    sets: list[ScoredSet]
    comparison: Comparison | None
    utterances: dict[str, list[ShownUtterance]]
    """Lists of utterances by their title."""
    notes: list[str]
    seed: int
    clips: dict[tuple[str, str], Clip] = field(default_factory=dict)
    """Audio by corpus and id."""

    @property
    def title(self) -> str:
        return "Phone recognition: " + " and ".join(self.names)

    @property
    def scored(self) -> bool:
        """Whether any utterance has a reference."""
        return any(scored.results for scored in self.sets)


def make_report(systems: Sequence[System], names: list[str], num_worst: int, seed: int) -> Report:
    """Score the systems and choose the utterances to show.

    Raises:
        ValueError: two systems that cannot be compared.
    """
    sets = [score_set(system.results, system.corpora) for system in systems]
    notes = [note for name, scored in zip(names, sets, strict=True) for note in _notes(name, scored, len(sets) > 1)]
    comparison = None
    if len(sets) == 2 and all(scored.results for scored in sets):
        comparison = compare(sets[0], sets[1], seed)
        for name, only in zip(names, comparison.only, strict=True):
            if only:
                notes.append(f"Only {name} has {_list(only)}: left out of the comparison.")
    return Report(names, sets, comparison, _chosen(sets, comparison, num_worst), notes, seed)


def _notes(name: str, scored: ScoredSet, several: bool) -> list[str]:
    """What was left out of the scores of a system."""
    notes = []
    for corpus in dict.fromkeys(corpus for corpus, _ in scored.unscorable):
        missing = [key for key in scored.unscorable if key[0] == corpus]
        if corpus in scored.corpora:
            notes.append(f"{corpus}: without a reference and not scored: {_list(missing)}.")
        else:
            notes.append(f"{corpus}: none of the {len(missing)} utterances has a reference; nothing of it is scored.")
    if scored.empty_hypotheses:
        empty = [key for key, result in zip(scored.keys, scored.results, strict=True) if not result.hyp]
        notes.append(f"Empty hypotheses, scored as deletions: {_list(empty)}.")
    if scored.dropped:
        notes.append(f"PFER leaves out what panphon does not know: {name_symbols(scored.dropped)}.")
    return [f"{name}: {note}" if several else note for note in notes]


def _list(keys: Sequence[tuple[str, str]]) -> str:
    shown = ", ".join(name for _, name in keys[:_NAMES_LISTED])
    return f"{len(keys)} utterances ({shown}{', ...' if len(keys) > _NAMES_LISTED else ''})"


def _chosen(sets: Sequence[ScoredSet], comparison: Comparison | None, count: int) -> dict[str, list[ShownUtterance]]:
    """The worst utterances; of two systems also those that differ most."""
    rows: list[tuple[int, ...]]
    if comparison is None:
        rows = [(i,) for i in range(len(sets[0].results))] if len(sets) == 1 else []
    else:
        rows = list(zip(*comparison.common, strict=True))
    counts = {row: [count_errors(scored.alignments[i]) for scored, i in zip(sets, row, strict=True)] for row in rows}

    def shown(row: tuple[int, ...]) -> ShownUtterance:
        return ShownUtterance(
            sets[0].corpora[row[0]],
            [scored.results[i] for scored, i in zip(sets, row, strict=True)],
            [scored.alignments[i] for scored, i in zip(sets, row, strict=True)],
            counts[row],
        )

    def badness(row: tuple[int, ...]) -> tuple[float, int]:
        return sum(c.per for c in counts[row]), sum(c.errors for c in counts[row])

    worst = [row for row in sorted(rows, key=badness, reverse=True) if badness(row)[1]]
    lists = {"Worst utterances": worst[:count]}
    if comparison is not None:
        change = {row: counts[row][1].errors - counts[row][0].errors for row in rows}
        by_change = sorted(rows, key=lambda row: change[row])
        half = max(1, count // 2)
        lists["B better"] = [row for row in by_change[:half] if change[row] < 0]
        lists["B worse"] = [row for row in by_change[::-1][:half] if change[row] > 0]
    return {title: [shown(row) for row in chosen] for title, chosen in lists.items()}


def add_audio(report: Report, data_config: Path, most: int) -> Report:
    """The report with audio for its first utterances.

    Raises:
        ValueError: a data config or shards that cannot be read.
    """
    # In turn from each list, so that none goes without.
    turns = zip_longest(*report.utterances.values())
    shown = list(dict.fromkeys(one.key for turn in turns for one in turn if one is not None))
    clips, notes = read_clips(data_config, shown[:most])
    if len(shown) > most:
        notes.append(f"Audio is embedded for {most} of the {len(shown)} utterances shown (--clips).")
    return replace(report, clips=clips, notes=[*report.notes, *notes])
