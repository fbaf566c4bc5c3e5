"""tusom2021 -> shar: recordings of East Tusom words with phone transcriptions (https://github.com/dmort27/tusom2021).

Reads a copy of the published repository: data/wav/*.wav and data/{train,dev,test}.yml, which map a file name to its
transcriptions; `no_tones` is used. Source: Mortensen et al., "Tusom2021: A Phonetically Transcribed Speech Dataset
from an Endangered Language for Universal Phone Recognition Experiments", Interspeech 2021.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml

from local.command import run
from local.corpus import SPLITS, Row, Skipped, SplitStats, prepare_from_arguments, safe_id, write_corpus

CORPUS = "tusom2021"
LANGUAGE = "tusom"
FIELD = "no_tones"


def read_split(data: Path, split: str) -> tuple[list[Row], list[Skipped]]:
    """Rows of data/{split}.yml, and the entries without a transcription; ValueError if the file is of another kind."""
    file = data / f"{split}.yml"
    try:
        # The C loader reads the same language ten times faster.
        content: Any = yaml.load(file.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file} is no table of 'file name: transcriptions' as the published repository has it")
    rows, skipped = [], []
    for name, entry in content.items():
        text = entry.get(FIELD) if isinstance(entry, dict) else None
        identity = f"{CORPUS}-{split}-{safe_id(Path(str(name)).stem)}"
        audio = data / "wav" / str(name)
        if text is None:
            skipped.append(Skipped(split, identity, str(audio), f"no field {FIELD} in {file}"))
        else:
            rows.append(Row(identity, audio, str(text), LANGUAGE, CORPUS, {"gloss": str(entry.get("gloss", ""))}))
    return rows, skipped


def read_repository(source: Path) -> tuple[dict[str, list[Row]], list[Skipped]]:
    """Rows by split from a copy of the repository, without the splits that it lacks, and what cannot be used."""
    data = source / "data"
    present = [split for split in SPLITS if (data / f"{split}.yml").is_file()]
    if not present or not (data / "wav").is_dir():
        raise ValueError(
            f"{source} is no copy of the tusom2021 repository: data/wav/ and data/{{train,dev,test}}.yml are expected"
        )
    for split in SPLITS:
        if split not in present:
            logging.warning("%s: %s does not exist: this split is left out", split, data / f"{split}.yml")
    read = {split: read_split(data, split) for split in present}
    return {split: rows for split, (rows, _) in read.items()}, [item for _, part in read.values() for item in part]


def prepare(source: Path, output: Path, phones: Path | None = None, jobs: int = 1) -> list[SplitStats]:
    """Write output/{train,dev,test} from a copy of the repository at `source`; a missing split is left out."""
    return write_corpus(*read_repository(source), output, phones, jobs)


def main() -> None:
    prepare_from_arguments(prepare, __doc__.splitlines()[0], "copy of the published repository")


if __name__ == "__main__":
    run(main)
