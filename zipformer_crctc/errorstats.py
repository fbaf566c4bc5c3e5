"""The published error statistics of a test set, as text (`errs-*.txt`)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from zipformer_crctc.metrics import Alignment, ErrorCounts, count_errors

_SECTIONS = ("PER-UTT DETAILS:", "SUBSTITUTIONS:", "DELETIONS:", "INSERTIONS:", "PER-WORD STATS:")


@dataclass
class _PhoneCounts:
    """What happened to one phone."""

    correct: int = 0
    errors: int = 0
    in_ref: int = 0
    in_hyp: int = 0


def error_statistics(alignments: Sequence[tuple[str, Alignment]]) -> str:
    """The whole file for (utterance id, alignment) pairs: rate, counts, details by utterance and by phone.

    Rows of a section run from the highest count to the lowest, ties in reverse order of their phones.
    """
    total = sum((count_errors(alignment) for _, alignment in alignments), ErrorCounts())
    events = Counter(pair for _, alignment in alignments for pair in alignment)
    substitutions = _ranked({pair: n for pair, n in events.items() if None not in pair and pair[0] != pair[1]})
    deletions = _ranked({pair: n for pair, n in events.items() if pair[1] is None})
    insertions = _ranked({pair: n for pair, n in events.items() if pair[0] is None})
    details, substituted, deleted, inserted, by_phone = _SECTIONS
    counts = f"{total.insertions} insertions, {total.deletions} deletions, {total.substitutions} substitutions"
    lines = [
        f"%WER = {total.per:.2f}",
        f"Errors: {counts}, over {total.reference_phones} reference words ({total.correct} correct)",
        f"Search below for sections starting with {', '.join(_SECTIONS)}",
        "",
        f"{details} corr or (ref->hyp)  ",
        *(f"{name}:\t{_details(alignment)}" for name, alignment in alignments),
        "",
        f"{substituted} count ref -> hyp",
        *(f"{n}   {ref} -> {hyp}" for n, (ref, hyp) in substitutions),
        "",
        f"{deleted} count ref",
        *(f"{n}   {ref}" for n, (ref, _) in deletions),
        "",
        f"{inserted} count hyp",
        *(f"{n}   {hyp}" for n, (_, hyp) in insertions),
        "",
        f"{by_phone} word  corr tot_errs count_in_ref count_in_hyp",
        *_phone_lines(events),
    ]
    return "\n".join(lines) + "\n"


def _ranked(counts: dict[tuple[str | None, str | None], int]) -> list[tuple[int, tuple[str | None, str | None]]]:
    return sorted(
        ((n, pair) for pair, n in counts.items()),
        key=lambda row: (row[0], row[1][0] or "", row[1][1] or ""),
        reverse=True,
    )


def _details(alignment: Alignment) -> str:
    """Phones separated by spaces; neighbouring errors merged as `(r1 r2->h1)`, `*` where a side has nothing."""
    parts: list[str] = []
    for correct, run in groupby(alignment, key=lambda pair: pair[0] == pair[1]):
        pairs = list(run)
        if correct:
            parts += [str(ref) for ref, _ in pairs]
        else:
            parts.append(f"({_side(ref for ref, _ in pairs)}->{_side(hyp for _, hyp in pairs)})")
    return " ".join(parts)


def _side(phones: Iterable[str | None]) -> str:
    return " ".join(phone for phone in phones if phone is not None) or "*"


def _phone_lines(events: Counter[tuple[str | None, str | None]]) -> list[str]:
    """Rows `phone   correct errors in_ref in_hyp`; a substitution is an error of both phones."""
    phones: defaultdict[str, _PhoneCounts] = defaultdict(_PhoneCounts)
    for (ref, hyp), n in events.items():
        if ref is not None:
            phones[ref].in_ref += n
        if hyp is not None:
            phones[hyp].in_hyp += n
        if ref == hyp and ref is not None:
            phones[ref].correct += n
            continue
        for phone in (ref, hyp):
            if phone is not None:
                phones[phone].errors += n
    rows = sorted(phones.items(), key=lambda item: (item[1].errors, item[0]), reverse=True)
    return [f"{phone}   {c.correct} {c.errors} {c.in_ref} {c.in_hyp}" for phone, c in rows]
