"""The files of pseudo-labelling: scores of a shard, its labelled copy, and the summary over all shards.

A folder holds `scores/NNNNNN.json` (what every model makes of every utterance), `shar/` (the shards with labels) and
`reports/NNNNNN.json` (what was kept of a shard, and why the rest was not). A file of scores or a report is written
whole when its shard is done, so that it is the mark by which a run that was broken off goes on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zipformer_crctc.agreement import Agreement, distribution
from zipformer_crctc.results import write_atomically
from zipformer_crctc.shar import DataError, Shard
from zipformer_crctc.sharcopy import copy_shard
from zipformer_crctc.sharwriter import remove_shard

NO_PHONE = "no phone in the label"


@dataclass(frozen=True)
class Selection:
    """Which utterances are kept: those with a label and a score of at most `limit`."""

    limit: float
    per_phone: bool

    def reason(self, utterance: Agreement) -> str | None:
        """Why an utterance is dropped; None if it is kept."""
        if not utterance.label:
            return NO_PHONE
        return None if utterance.score(self.per_phone) <= self.limit else "the models disagree"


@dataclass(frozen=True)
class ShardScores:
    """What the models make of a shard."""

    utterances: list[Agreement]
    not_decoded: dict[str, list[str]] = field(default_factory=dict)
    """Reason: ids or places of what could not be read."""
    unknown_to_panphon: dict[str, int] = field(default_factory=dict)
    """Symbols of hypotheses that the distance does not see, with their counts."""
    left_out: dict[str, int] = field(default_factory=dict)
    """`<unk>` and its like, which stand in no label, with their counts."""

    def write(self, path: Path) -> None:
        """Write them whole or not at all."""
        write_atomically(path, json.dumps(asdict(self), ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> ShardScores:
        """Read what `write` wrote; raises DataError for another file."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**content, "utterances": [Agreement(**item) for item in content["utterances"]]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: no scores of this program ({error}); remove it and run again") from error

    def candidates(self, per_phone: bool) -> list[float]:
        """The scores of the utterances that have a label."""
        return [utterance.score(per_phone) for utterance in self.utterances if utterance.label]


def scores_path(folder: Path, shard: Shard) -> Path:
    """Where the scores of a shard are."""
    return folder / "scores" / f"{shard.number:06d}.json"


def report_path(folder: Path, shard: Shard) -> Path:
    """Where the report of a shard is."""
    return folder / "reports" / f"{shard.number:06d}.json"


def read_report(folder: Path, shard: Shard, selection: Selection) -> dict[str, Any] | None:
    """The report of a shard that was written with this selection; None where it has to be written."""
    path = report_path(folder, shard)
    if not path.is_file():
        return None
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report if report["selection"] == asdict(selection) else None


def write_labelled(folder: Path, shard: Shard, selection: Selection, models: Sequence[str]) -> None:
    """Write the labelled copy of a shard and its report; both are replaced if they were of another selection."""
    scores = ShardScores.read(scores_path(folder, shard))
    dropped = Counter({reason: len(names) for reason, names in scores.not_decoded.items()})
    kept: dict[str, Agreement] = {}
    for utterance in scores.utterances:
        reason = selection.reason(utterance)
        if reason is None:
            kept[utterance.id] = utterance
        else:
            dropped[reason] += 1
    report_path(folder, shard).unlink(missing_ok=True)
    if kept:
        _copy_labelled(shard, folder / "shar", kept, models)
    else:
        remove_shard(folder / "shar", shard.number)
    report = {
        "selection": asdict(selection),
        "utterances": len(kept) + dropped.total(),
        "kept": len(kept),
        "kept_seconds": sum(utterance.duration for utterance in kept.values()),
        "dropped": dict(dropped.most_common()),
        "labels_of": dict(Counter(models[utterance.label_of] for utterance in kept.values()).most_common()),
    }
    write_atomically(report_path(folder, shard), json.dumps(report, ensure_ascii=False, indent=2) + "\n")


def summarise(folder: Path, shards: Sequence[Shard], selection: Selection) -> dict[str, Any] | None:
    """Counts over all shards and the distribution of the scores; None while a shard is not written yet."""
    reports = [read_report(folder, shard, selection) for shard in shards]
    done = [report for report in reports if report is not None]
    if len(done) < len(reports):
        return None
    everything = [ShardScores.read(scores_path(folder, shard)) for shard in shards]
    labelled = [utterance for scores in everything for utterance in scores.utterances if utterance.label]
    kept = [utterance for utterance in labelled if selection.reason(utterance) is None]
    return {
        "selection": asdict(selection),
        "shards": len(shards),
        "utterances": sum(report["utterances"] for report in done),
        "kept": len(kept),
        "hours": round(sum(u.duration for scores in everything for u in scores.utterances) / 3600, 4),
        "kept_hours": round(sum(utterance.duration for utterance in kept) / 3600, 4),
        "dropped": _total(report["dropped"] for report in done),
        "labels_of": _total(report["labels_of"] for report in done),
        "unknown_to_panphon": _total(scores.unknown_to_panphon for scores in everything),
        "left_out_of_labels": _total(scores.left_out for scores in everything),
        "pfer": distribution([utterance.pfer for utterance in labelled]),
        "pfer_per_phone": distribution([utterance.pfer_per_phone for utterance in labelled]),
        "kept_pfer": distribution([utterance.pfer for utterance in kept]),
        "kept_pfer_per_phone": distribution([utterance.pfer_per_phone for utterance in kept]),
    }


def _total(counts: Iterator[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return dict(total.most_common())


def _copy_labelled(shard: Shard, folder: Path, kept: Mapping[str, Agreement], models: Sequence[str]) -> None:
    """The cuts that are kept, with their labels and the audio as it is."""
    missing = dict(kept)

    def label(cut: Mapping[str, Any]) -> Mapping[str, Any] | None:
        utterance = missing.pop(cut["id"], None)
        return None if utterance is None else labelled_cut(cut, utterance, models)

    copy_shard(shard, folder, label)
    if missing:
        raise DataError(
            f"{shard.cuts}: {min(missing)} and {len(missing) - 1} more are gone since the shard was scored: "
            "bring it back, or write to another --output-dir"
        )


def labelled_cut(cut: Mapping[str, Any], utterance: Agreement, models: Sequence[str]) -> dict[str, Any]:
    """A cut with the label as its text and the scores in the supervision's `custom`.

    Language and speaker stay; an old text and its alignment go.
    """
    empty = {"id": cut["id"], "recording_id": cut["recording"]["id"], "start": 0.0, "channel": 0}
    (supervision,) = cut.get("supervisions") or [{**empty, "duration": cut["duration"]}]
    scores = {
        "pfer": utterance.pfer,
        "pfer_per_phone": utterance.pfer_per_phone,
        "label_of": models[utterance.label_of],
    }
    custom = {**(supervision.get("custom") or {}), "pseudo_label": scores}
    rest = {name: value for name, value in supervision.items() if name != "alignment"}
    return {**cut, "supervisions": [{**rest, "text": utterance.label, "custom": custom}]}
