"""The token sequences of the texts in shar folders, for statistics over them; no audio is read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from zipformer_crctc.objective import TargetEncoder
from zipformer_crctc.shar import DataError, Skipped, find_shards, read_shard


def read_texts(folders: Iterable[Path], encode: TargetEncoder, language: str = "") -> list[list[int]]:
    """The tokens of all texts in folders of shards, or of those in a language; empty texts are counted and left out.

    Raises DataError that lists the languages where none is the one that is asked for.
    """
    texts: list[list[int]] = []
    languages: Counter[str] = Counter()
    skipped = Skipped()
    for folder in folders:
        for shard in find_shards(folder):
            for utterance in read_shard(shard, skipped):
                languages[utterance.language] += 1
                if not language or utterance.language == language:
                    if tokens := encode(utterance.text):
                        texts.append(tokens)
                    else:
                        skipped.add("no phone in the text", utterance.id)
    if skipped.total:
        logging.warning("%s", skipped.report())
    if language and language not in languages:
        known = ", ".join(f"{name or '(none)'} {count}" for name, count in sorted(languages.items()))
        raise DataError(f"language {language!r}: no text has it; the languages are: {known or 'none'}")
    return texts
