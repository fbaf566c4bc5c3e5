"""The published error statistics."""

from __future__ import annotations

from zipformer_crctc.errorstats import error_statistics
from zipformer_crctc.metrics import align

EXPECTED = """%WER = 57.14
Errors: 1 insertions, 1 deletions, 2 substitutions, over 7 reference words (4 correct)
Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, INSERTIONS:, PER-WORD STATS:

PER-UTT DETAILS: corr or (ref->hyp)@@
u1:\tk (æ->a) t
u2:\ts (i m->e) a
u3:\t(*->p)

SUBSTITUTIONS: count ref -> hyp
1   æ -> a
1   m -> e

DELETIONS: count ref
1   i

INSERTIONS: count hyp
1   p

PER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp
æ   0 1 1 0
p   0 1 0 1
m   0 1 1 0
i   0 1 1 0
e   0 1 0 1
a   1 1 1 2
t   1 0 1 1
s   1 0 1 1
k   1 0 1 1
""".replace("@", " ")


def test_layout() -> None:
    pairs = {"u1": ("kæt", "kat"), "u2": ("sima", "sea"), "u3": ("", "p")}
    assert error_statistics([(name, align(*pair)) for name, pair in pairs.items()]) == EXPECTED


def test_empty() -> None:
    assert error_statistics([]).startswith("%WER = nan\nErrors: 0 insertions, 0 deletions, 0 substitutions, over 0")
