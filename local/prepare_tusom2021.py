"""tusom2021 -> shar: recordings of East Tusom words with phone transcriptions (https://github.com/dmort27/tusom2021).

Reads a copy of the published repository: data/wav/*.wav and data/{train,dev,test}.yml, which map a file name to its
transcriptions; `no_tones` is used. Source: Mortensen et al., "Tusom2021: A Phonetically Transcribed Speech Dataset
from an Endangered Language for Universal Phone Recognition Experiments", Interspeech 2021.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import yaml

from local.command import load_tokenizer, positive_int, run
from local.corpus import SPLITS, Row, Skipped, SplitStats, report, safe_id, write_split
from local.shar import clear_shards

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


def prepare(source: Path, output: Path, phones: Path | None = None, jobs: int = 1) -> list[SplitStats]:
    """Write output/{train,dev,test} from a copy of the repository at `source`; a missing split is skipped."""
    data = source / "data"
    present = [split for split in SPLITS if (data / f"{split}.yml").is_file()]
    if not present or not (data / "wav").is_dir():
        raise ValueError(
            f"{source} is no copy of the tusom2021 repository: data/wav/ and data/{{train,dev,test}}.yml are expected"
        )
    tokenizer = load_tokenizer(phones)
    read = {split: read_split(data, split) for split in present}
    stats = []
    for split in SPLITS:
        if split in read:
            stats.append(write_split(read[split][0], split, output / split, tokenizer, jobs))
        else:
            logging.warning("%s: %s does not exist: this split is left out", split, data / f"{split}.yml")
            clear_shards(output / split)
    report(stats, [item for _, skipped in read.values() for item in skipped], output)
    return stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="copy of the published repository")
    parser.add_argument("--output", type=Path, required=True, help="folder for train, dev and test")
    parser.add_argument("--phones", type=Path, help="table of phones (default: the project's own)")
    parser.add_argument("--jobs", type=positive_int, default=1, help="processes")
    args = parser.parse_args()
    prepare(args.source, args.output, args.phones, args.jobs)


if __name__ == "__main__":
    run(main)
