"""Decoding results for the tests of scoring and reporting."""

from __future__ import annotations

import random
from collections.abc import Sequence

from zipformer_crctc.results import UtteranceResult

PHONES = ["p", "b", "t", "d", "k", "s", "ʃ", "m", "n", "l", "i", "e", "a", "o", "u", "ʰ", "ː"]


def random_results(
    count: int,
    error_rate: float = 0.3,
    num_languages: int = 3,
    seed: int = 0,
    prefix: str = "u",
    phones: Sequence[str] = PHONES,
) -> list[UtteranceResult]:
    """Utterances of 4 to 12 phones; references depend on `seed` alone, hypotheses on the error rate too."""
    texts, errors = random.Random(seed), random.Random(f"{seed} {error_rate}")
    results = []
    for number in range(count):
        ref = texts.choices(phones, k=texts.randint(4, 12))
        hyp = []
        for phone in ref:
            if errors.random() >= error_rate:
                hyp.append(phone)
            else:  # none, another, or one too many
                hyp += errors.choice([[], [errors.choice(phones)], [phone, errors.choice(phones)]])
        language = f"l{number % num_languages:02d}"
        times = [round(0.045 + 0.1 * place, 3) for place in range(len(hyp))]
        results.append(UtteranceResult(f"{prefix}{number:04d}", ref, hyp, language, f"s{number % 7}", times, -1.0))
    return results
