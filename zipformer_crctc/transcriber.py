"""Recordings to phones in time: the Python interface, `PhoneRecognizer`.

    from zipformer_crctc import PhoneRecognizer
    recognizer = PhoneRecognizer.from_pretrained("exp/small")
    for result in recognizer.transcribe(["interview.mp3", "recordings/"]):
        print(result.id, *result.phones)

A short recording is a single window, a long one is cut into many (windows.py), in its pauses where it has some. Windows
are held until they are worth several batches, sorted by length, passed through the model and given back to their
recordings in order.

Legend: N windows, T feature frames of 10 ms, T' output frames, V pieces.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zipformer_crctc.audio import AudioError
from zipformer_crctc.config import DecodeConfig
from zipformer_crctc.encoder import widest
from zipformer_crctc.features import LOG_EPS, SAMPLING_RATE, Fbank, num_feature_frames
from zipformer_crctc.frontend import MIN_FEATURE_FRAMES
from zipformer_crctc.inventory import parse_inventory
from zipformer_crctc.methods import build_search
from zipformer_crctc.pauses import MIN_PAUSE, PauseFinder
from zipformer_crctc.pretrained import find_weights
from zipformer_crctc.recogniser import Recogniser, build_recogniser
from zipformer_crctc.search import frame_time, naming
from zipformer_crctc.sources import Source, find_sources
from zipformer_crctc.timefiles import TimedUtterance
from zipformer_crctc.times import (
    LabelCentres,
    Segment,
    TimeCorrection,
    hypothesis_paths,
    label_centres,
    segments_of,
)
from zipformer_crctc.windows import PIECE_WINDOWS, Cutter, Grid, Piece, Stitcher, Window, kept_frames, make_grid

logger = logging.getLogger(__name__)

POOL_BATCHES = 4
"""Windows are held until they fill so many batches, which are then made of windows of similar length."""
PAUSES = "pauses"
SPLITS = (PAUSES, "windows")
"""How long recordings are cut: in pauses, or into overlapping windows wherever they fall."""


@dataclass(frozen=True)
class Transcription:
    """What was heard in one recording; a line of the JSON lines."""

    id: str
    audio: str
    """The path as given; `-` for standard input, empty for an array."""
    phones: list[str] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    """Where each phone begins, in seconds from the start of the recording."""
    ends: list[float] = field(default_factory=list)
    """Where each phone ends, in seconds."""
    confidence: list[float] = field(default_factory=list)
    """The mean posterior of each phone over its frames."""
    score: float | None = None
    """The score of the search, in nats; of a long recording the sum over its pieces."""
    duration: float = 0.0
    """Seconds of audio."""
    silence: float = 0.0
    """Seconds of it that the model was not given, in long pauses."""
    warning: str | None = None
    """What is odd about the audio."""
    problem: str | None = None
    """Why there is no transcription; None where there is one, though it be empty."""

    @property
    def segments(self) -> list[Segment]:
        """The phones in time."""
        values = zip(self.phones, self.starts, self.ends, self.confidence, strict=True)
        return [Segment(*value) for value in values]

    def timed(self) -> TimedUtterance:
        """What files of phones in time need."""
        return TimedUtterance(self.id, self.duration, self.segments)


@dataclass
class _Recording:
    """A recording under way."""

    source: Source
    cutter: Cutter
    stitcher: Stitcher
    tokens: list[int] = field(default_factory=list)
    centres: LabelCentres = field(default_factory=lambda: LabelCentres([], []))
    score: float = 0.0
    problem: str | None = None
    complete: bool = False

    @property
    def duration(self) -> float:
        return self.cutter.position / SAMPLING_RATE


@dataclass
class _Held:
    """A window that waits for its batch."""

    recording: _Recording
    features: Tensor
    """(T, 80)."""
    start: int
    """In the recording, in samples."""
    first: bool
    last: bool
    log_probs: Tensor | None = None
    """(T', V), of the frames that are kept."""


class PhoneRecognizer:
    """A model that transcribes recordings of any length.

    Args:
        recogniser: the model.
        decode: the search, its fields as of decode.py.
        correction: of the times; None is the default one.
        window: longest stretch that the model gets at once, in seconds.
        overlap: of two windows, in seconds.
        batch_seconds: audio in a batch, padding included.
        split: how recordings are cut that are longer than a window, one of SPLITS.
        min_pause: shortest pause to cut in, in seconds.

    Raises:
        ValueError: settings that cannot be or contradict each other, a language model or an inventory that cannot be
            used.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        decode: DecodeConfig | None = None,
        correction: TimeCorrection | None = None,
        window: float = 30.0,
        overlap: float = 4.0,
        batch_seconds: float = 240.0,
        split: str = PAUSES,
        min_pause: float = 0.25,
    ) -> None:
        if batch_seconds <= 0:
            raise ValueError(f"batch_seconds: {batch_seconds}; must be above 0")
        if split not in SPLITS:
            raise ValueError(f"split: {split}; must be {' or '.join(SPLITS)}")
        if min_pause < MIN_PAUSE:
            raise ValueError(f"min_pause: {min_pause:g} s; must be at least {MIN_PAUSE:g} s")
        self.split = split
        self.min_pause = min_pause
        self.recogniser = recogniser
        self.grid: Grid = make_grid(recogniser.config, window, overlap)
        self.batch_frames = round(batch_seconds * 100)
        self._decode = decode or DecodeConfig()
        self._search = build_search(self._decode, recogniser.tokenizer, recogniser.device, recogniser.factor)
        self._correction = correction
        self._fbank = Fbank()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str = "auto",
        precision: str = "fp32",
        avg: int = 1,
        iter: int = 0,
        use_averaged_model: bool = True,
        bpe_model: Path | None = None,
        published_padding: bool = False,
        chunk_size: int | None = None,
        left_context_frames: int | None = None,
        **settings: Any,
    ) -> PhoneRecognizer:
        """Load a model.

        Args:
            name: a checkpoint of ours or a published one (.pt, .pth), a folder of checkpoints, a folder with
                config.json and model.safetensors, or the id of such a repository on the Hugging Face Hub.
            device: auto (GPU if there is one), cpu or cuda.
            precision: fp32; for speed on a GPU bf16 or fp16; auto is bf16 on a GPU, else fp32.
            avg, iter, use_averaged_model: of a folder of checkpoints, those to average; iter 0 is the newest.
            bpe_model: sentencepiece model of the tokenizer; None is the model's own, else the published one.
            published_padding: let padding leak into valid frames, as published.
            chunk_size, left_context_frames: of a causal model, in frames of 20 ms; None is the widest it was trained
                with, -1 no limit.
            settings: of the class.

        Raises:
            CheckpointError: a model that is missing, unsafe, of another kind or vocabulary.
            ValueError: a device that is not there, settings that cannot be.
        """
        weights = find_weights(name, avg=avg, iter=iter, use_averaged_model=use_averaged_model)
        given: dict[str, tuple[int, ...]] = {}
        for field_name, value in (("chunk_size", chunk_size), ("left_context_frames", left_context_frames)):
            if weights.config.causal:
                given[field_name] = (widest(getattr(weights.config, field_name)) if value is None else value,)
            elif value is not None:
                raise ValueError(f"{field_name} {value}: the model is not causal, so it has no chunks; leave it out")
        recogniser = build_recogniser(weights, given, bpe_model, device, published_padding, precision)
        return cls(recogniser, **settings)

    def with_inventory(self, phones: str) -> PhoneRecognizer:
        """The same recogniser, of which only some phones can come out.

        phones: as in the file of an inventory (inventory.py). Raises ValueError for phones that the tokenizer cannot
        write, and for none at all.
        """
        model, other = self.recogniser, copy(self)
        allowed = parse_inventory(phones, model.tokenizer)
        other._search = build_search(self._decode, model.tokenizer, model.device, model.factor, allowed=allowed)
        return other

    def transcribe(
        self, audio: Any, sampling_rate: float = SAMPLING_RATE, channel: int | None = None, progress: bool = False
    ) -> list[Transcription]:
        """Transcribe recordings.

        Args:
            audio: a list, or one, of: paths of files and folders, patterns, `-` for standard input, arrays (samples,)
                or (samples, channels).
            sampling_rate: of the arrays, in Hz.
            channel: the channel to take, from 1; None is the mean of all.
            progress: show a progress bar.

        Returns:
            a result for each recording, in order; one that cannot be used has a `problem` in place of phones.
        """
        inputs = list(audio) if isinstance(audio, list | tuple) else [audio]
        return list(self.stream(find_sources(inputs, sampling_rate, channel), progress))

    def stream(self, sources: Sequence[Source], progress: bool = False) -> Iterator[Transcription]:
        """The results of some sources in their order, each as soon as it is there and those before it are."""
        from tqdm import tqdm

        waiting: list[_Recording] = []
        seconds = 0.0
        # None hides the bar where standard error is no terminal.
        with tqdm(total=len(sources), unit="recording", disable=None if progress else True) as bar:
            for pool in self._pools(sources, waiting):
                self._pass(pool)
                self._search_pieces(pool)
                seconds += sum(len(held.features) for held in pool) / 100
                bar.set_postfix_str(f"{seconds:.0f} s of audio")
                while waiting and waiting[0].complete:
                    bar.update()
                    yield self._result(waiting.pop(0))

    def _pools(self, sources: Iterable[Source], waiting: list[_Recording]) -> Iterator[list[_Held]]:
        """Windows worth several batches at a time; each recording is added to `waiting` when it begins."""
        held: list[_Held] = []
        frames = 0
        for source in sources:
            recording = _Recording(source, self._cutter(), self._stitcher())
            waiting.append(recording)
            try:
                for window in recording.cutter.windows(source.stream):
                    held.append(self._hold(recording, window))
                    frames += len(held[-1].features)
                    if frames >= POOL_BATCHES * self.batch_frames:
                        yield held
                        held, frames = [], 0
                recording.complete = True  # once what is held has been through the model
            except AudioError as error:
                recording.problem, recording.complete = str(error), True
                held = [window for window in held if window.recording is not recording]
                frames = sum(len(window.features) for window in held)
        yield held

    def _cutter(self) -> Cutter:
        return Cutter(self.grid, PauseFinder(self.min_pause, self._fbank) if self.split == PAUSES else None)

    def _stitcher(self) -> Stitcher:
        frames = PIECE_WINDOWS * self.grid.window // self.grid.samples_per_frame
        return Stitcher(frames, self.recogniser.tokenizer.blank_id)

    def _hold(self, recording: _Recording, window: Window) -> _Held:
        samples = torch.from_numpy(window.samples)
        if num_feature_frames(len(samples)) < MIN_FEATURE_FRAMES:
            raise AudioError(f"too short: {len(samples)} samples at 16 kHz, fewer than {MIN_FEATURE_FRAMES} frames")
        return _Held(recording, self._fbank(samples), window.start, window.first, window.last)

    @torch.inference_mode()
    def _pass(self, pool: Sequence[_Held]) -> None:
        """Put every window through the model."""
        for batch in _batches(pool, [len(held.features) for held in pool], self.batch_frames):
            features = pad_sequence([held.features for held in batch], batch_first=True, padding_value=LOG_EPS)
            num_frames = torch.tensor([len(held.features) for held in batch])
            log_probs, lengths = self.recogniser.log_probs_of(features, num_frames)
            for held, frames, length in zip(batch, log_probs, lengths.tolist(), strict=True):
                held.log_probs = kept_frames(frames[:length], self.grid, held.first, held.last).clone()

    @torch.inference_mode()
    def _search_pieces(self, pool: Sequence[_Held]) -> None:
        """Give the windows back to their recordings in order, and search what is ready."""
        pieces: list[tuple[_Recording, Piece]] = []
        for held in pool:
            assert held.log_probs is not None
            ready = held.recording.stitcher.add(held.log_probs, held.start, held.last)
            pieces += [(held.recording, piece) for piece in ready]
        found: dict[int, tuple[list[int], LabelCentres, float]] = {}
        sizes = [len(piece.log_probs) for _, piece in pieces]
        for batch in _batches(range(len(pieces)), sizes, self.batch_frames // (2 * self.recogniser.factor)):
            with naming([pieces[i][0].source.id for i in batch]):
                found |= zip(batch, self._search_batch([pieces[i][1] for i in batch]), strict=True)
        for i, (recording, piece) in enumerate(pieces):
            tokens, centres, score = found[i]
            start = frame_time(piece.first_frame, self.recogniser.factor) - frame_time(0, self.recogniser.factor)
            start += piece.stretch_start / SAMPLING_RATE
            recording.tokens += tokens
            recording.centres.seconds.extend(start + second for second in centres.seconds)
            recording.centres.confidence.extend(centres.confidence)
            recording.score += score

    def _search_batch(self, pieces: Sequence[Piece]) -> list[tuple[list[int], LabelCentres, float]]:
        """Tokens, their centres from the start of the piece, and the score, of each piece."""
        log_probs = pad_sequence([piece.log_probs for piece in pieces], batch_first=True)
        lengths = torch.tensor([len(piece.log_probs) for piece in pieces], device=log_probs.device)
        best = [hypotheses[0] for hypotheses in self._search(log_probs, lengths)]
        paths = hypothesis_paths(log_probs, lengths, best)
        return [
            (hypothesis.tokens, label_centres(piece.log_probs, path, self.recogniser.factor), hypothesis.score)
            for piece, hypothesis, path in zip(pieces, best, paths, strict=True)
        ]

    def _result(self, recording: _Recording) -> Transcription:
        source = recording.source
        result = Transcription(source.id, source.audio, warning=source.stream.warning, problem=recording.problem)
        name = source.audio or source.id
        if result.problem is not None:
            logger.warning("%s: %s", name, result.problem)
            return result
        if result.warning is not None:
            logger.warning("%s: %s", name, result.warning)
        # A causal model hears the end of a stretch late, at worst after the next one has begun.
        seconds = np.minimum.accumulate(recording.centres.seconds[::-1])[::-1].tolist()
        centres = LabelCentres(seconds, recording.centres.confidence)
        segments = segments_of(
            recording.tokens, centres, recording.duration, self.recogniser.tokenizer, self._correction
        )
        return replace(
            result,
            phones=[segment.phone for segment in segments],
            starts=[segment.start for segment in segments],
            ends=[segment.end for segment in segments],
            confidence=[segment.confidence for segment in segments],
            score=recording.score,
            duration=recording.duration,
            silence=recording.cutter.silence / SAMPLING_RATE,
        )


def _batches(items: Sequence[Any], sizes: Sequence[int], limit: int) -> Iterator[list[Any]]:
    """The items in batches of similar size, longest first; the longest times their number is at most the limit.

    An item above the limit is a batch of its own.
    """
    batch: list[Any] = []
    longest = 0
    for i in sorted(range(len(items)), key=lambda i: -sizes[i]):
        longest = longest or sizes[i]
        if batch and longest * (len(batch) + 1) > limit:
            yield batch
            batch, longest = [], sizes[i]
        batch.append(items[i])
    if batch:
        yield batch
