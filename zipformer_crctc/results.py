"""What decoding leaves behind: transcripts, error statistics, JSON lines, and the table of error rates.

Texts, statistics and summary have the published layout, so that scripts written for it can read them; the JSON lines
hold everything, and reports read only those. Every file is written whole or not at all.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from zipformer_crctc.errorstats import error_statistics
from zipformer_crctc.metrics import align, count_errors
from zipformer_crctc.search import Hypothesis
from zipformer_crctc.times import Segment
from zipformer_crctc.tokenizer import PhoneTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UtteranceResult:
    """Reference and hypothesis of one utterance, as phones without `▁`."""

    id: str
    ref: list[str]
    hyp: list[str]
    language: str = ""
    speaker: str = ""
    times: list[float] = field(default_factory=list)
    """The time of each hypothesis phone in seconds."""
    score: float | None = None
    """Log-probability of the hypothesis in nats; of a beam search with language model and bonus."""
    nbest: list[dict[str, Any]] = field(default_factory=list)
    """Where the search gave several hypotheses, all of them, best first: each with hyp, times, score and acoustic, the
    share of the acoustic model in the score. Hypotheses that differ in word boundaries only are all listed."""
    starts: list[float] = field(default_factory=list)
    """Where each hypothesis phone begins, in seconds."""
    ends: list[float] = field(default_factory=list)
    """Where each hypothesis phone ends, in seconds."""
    confidence: list[float] = field(default_factory=list)
    """The mean posterior of each hypothesis phone over its frames."""
    duration: float | None = None
    """Seconds of audio."""

    @classmethod
    def of(
        cls,
        id: str,
        text: str,
        hypothesis: Hypothesis,
        tokenizer: PhoneTokenizer,
        language: str = "",
        speaker: str = "",
        nbest: Sequence[Hypothesis] = (),
    ) -> UtteranceResult:
        """The result for a search hypothesis and a reference text, which is encoded as it stands (normalise first).

        nbest: all hypotheses of the search; stored if they are several.
        """
        hyp, times = _phones_and_times(hypothesis, tokenizer)
        listed = []
        for other in nbest if len(nbest) > 1 else ():
            phones, other_times = _phones_and_times(other, tokenizer)
            listed.append({"hyp": phones, "times": other_times, "score": other.score, "acoustic": other.acoustic})
        return cls(
            id=id,
            ref=tokenizer.phones(tokenizer.encode(text)),
            hyp=hyp,
            language=language,
            speaker=speaker,
            times=times,
            score=hypothesis.score,
            nbest=listed,
        )

    def with_segments(self, segments: Sequence[Segment], duration: float) -> UtteranceResult:
        """The same result with its phones in time; segments: one for each hypothesis phone."""
        if [segment.phone for segment in segments] != self.hyp:
            raise ValueError(f"utterance {self.id}: segments of other phones than those of the hypothesis")
        return replace(
            self,
            starts=[segment.start for segment in segments],
            ends=[segment.end for segment in segments],
            confidence=[segment.confidence for segment in segments],
            duration=duration,
        )

    def segments(self) -> list[Segment]:
        """The hypothesis phones in time; none for a result without `starts`."""
        if not self.starts:
            return []
        return [Segment(*values) for values in zip(self.hyp, self.starts, self.ends, self.confidence, strict=True)]

    @property
    def scorable(self) -> bool:
        """Whether there is a reference: an empty one has no error rate."""
        return bool(self.ref)


def _phones_and_times(hypothesis: Hypothesis, tokenizer: PhoneTokenizer) -> tuple[list[str], list[float]]:
    """Without word boundaries."""
    pairs = zip(hypothesis.tokens, hypothesis.times, strict=True)
    kept = [(token, time) for token, time in pairs if token != tokenizer.boundary_id]
    return tokenizer.phones(token for token, _ in kept), [time for _, time in kept]


def split_scorable(results: Iterable[UtteranceResult]) -> tuple[list[UtteranceResult], list[UtteranceResult]]:
    """Results that can be scored, and those whose reference is empty."""
    results = list(results)
    return [r for r in results if r.scorable], [r for r in results if not r.scorable]


def file_suffix(
    *,
    avg: int,
    iteration: int = 0,
    epoch: int = 0,
    chunk_size: int | None = None,
    left_context_frames: int | None = None,
    use_averaged_model: bool = False,
) -> str:
    """The published suffix of result files; `iteration` wins over `epoch`; chunks are for causal models only."""
    if iteration <= 0 and epoch <= 0:
        raise ValueError(f"iteration={iteration}, epoch={epoch}: one of them must be above 0 to name the result files")
    suffix = f"iter-{iteration}-avg-{avg}" if iteration > 0 else f"epoch-{epoch}-avg-{avg}"
    if chunk_size is not None:
        suffix += f"-chunk-{chunk_size}-left-context-{left_context_frames}"
    return suffix + ("-use-averaged-model" if use_averaged_model else "")


def write_results(
    folder: str | Path, test_set: str, suffix: str, method: str, results: Iterable[UtteranceResult]
) -> dict[str, Path]:
    """Write the files of one test set into `folder` and return their paths by kind.

    `recogs-`, `errs-` and `wer-summary-{test_set}-{suffix}.txt`, and `results-{test_set}-{suffix}.jsonl`. All
    utterances stand in the transcripts; those without a reference are left out of the rates and named in the log.
    """
    folder = Path(folder)
    ordered = sorted(results, key=lambda r: (r.id, r.ref, r.hyp))
    scored, unscorable = split_scorable(ordered)
    if unscorable:
        logger.warning("%s: %s", test_set, describe_unscorable(unscorable))
    alignments = [(r.id, align(r.ref, r.hyp)) for r in scored]
    totals = sum((count_errors(a).errors for _, a in alignments)), sum(len(r.ref) for r in scored)
    rate = 100.0 * totals[0] / totals[1] if totals[1] else float("nan")
    texts = {
        "recogs": "".join(f"{r.id}:\tref={r.ref}\n{r.id}:\thyp={r.hyp}\n" for r in ordered),
        "errs": error_statistics(alignments),
        "wer-summary": f"settings\tWER\n{method}\t{rate:.2f}\n",
        "results": json_lines(ordered),
    }
    paths = {kind: folder / f"{kind}-{test_set}-{suffix}.{'jsonl' if kind == 'results' else 'txt'}" for kind in texts}
    for kind, text in texts.items():
        write_atomically(paths[kind], text)
    return paths


def describe_unscorable(results: Sequence[UtteranceResult]) -> str:
    """A sentence that names the utterances without a reference."""
    return f"{len(results)} utterances have an empty reference and are not scored: {', '.join(r.id for r in results)}"


def json_lines(results: Iterable[UtteranceResult]) -> str:
    """One JSON object per utterance and line: the fields of UtteranceResult; times in seconds, the score in nats."""
    return "".join(json.dumps(asdict(result), ensure_ascii=False) + "\n" for result in results)


def read_json_lines(path: str | Path) -> list[UtteranceResult]:
    """The results that `write_results` stored. Raises ValueError with file and line for one it cannot read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}); decode again") from error
    results = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            results.append(_result(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: is not a decoding result ({error}); decode again") from error
    return results


def _result(fields: dict[str, Any]) -> UtteranceResult:
    """The result of one JSON object; a reference that is missing is an empty one. Raises TypeError, ValueError."""
    if not isinstance(fields, dict):
        raise TypeError("no JSON object")
    result = UtteranceResult(**{**fields, "ref": fields.get("ref") or []})
    texts = [result.id, result.language, result.speaker]
    for name, phones in (("ref", result.ref), ("hyp", result.hyp)):
        if not isinstance(phones, list):
            raise TypeError(f"{name} is {phones!r}, not a list of phones")
        texts += phones
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"{wrong[0]!r} stands where a text belongs")
    return result


def write_atomically(path: str | Path, text: str) -> None:
    """Write a text file beside its place and move it there, so that no half-written file is ever seen."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
