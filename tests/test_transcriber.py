"""Recordings of any length to phones: with a model that hears one frame at a time, so that windows change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from random_checkpoint import write_checkpoint
from zipformer_crctc import PhoneRecognizer, transcriber
from zipformer_crctc.config import ModelConfig
from zipformer_crctc.inventory import inventory_phones
from zipformer_crctc.recogniser import Recogniser
from zipformer_crctc.sources import Source
from zipformer_crctc.tokenizer import PhoneTokenizer

TOKENIZER = PhoneTokenizer.from_table()
RATE = 16_000


@dataclass
class LocalRecogniser:
    """Output frame t' depends on nothing but the feature frames 2 t' + 4 that it stands for."""

    factor: int = 1
    batches: list[tuple[int, ...]] = field(default_factory=list)
    """Numbers of frames in each batch."""
    tokenizer: PhoneTokenizer = TOKENIZER
    device: str = "cpu"

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.config = ModelConfig(output_downsampling_factor=self.factor)
        self.weight = torch.randn((80, self.tokenizer.vocab_size), generator=generator)

    def log_probs_of(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        self.batches.append(tuple(num_frames.tolist()))
        frames = (features.shape[1] - 7) // 2
        scores = features[:, 4 : 4 + 2 * frames : 2] @ self.weight
        scores[..., 1:4] = -100.0
        scores = scores[:, self.factor - 1 :: self.factor]
        scores[..., 0] = scores[..., 4:].amax(-1) - 4.0  # blank in half of the frames
        scores[:, ::2, 0] += 8.0
        return scores.log_softmax(-1), ((num_frames - 7) // 2) // self.factor


def recognizer(factor: int = 1, **settings: Any) -> PhoneRecognizer:
    model: Any = LocalRecogniser(factor)
    return PhoneRecognizer(model, **settings)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Of random models: some find no phones at all."""
    torch.manual_seed(0)


def babble(seconds: float, seed: int = 0) -> np.ndarray:
    """Another tone every 70 ms."""
    rng = np.random.default_rng(seed)
    pitch = np.repeat(rng.uniform(100, 7000, int(seconds / 0.07) + 1), int(0.07 * RATE))[: int(seconds * RATE)]
    noise = rng.standard_normal(len(pitch)) * 0.003
    return (0.2 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE) + noise).astype(np.float32)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("batch_seconds", [5.0, 1000.0])
def test_windows_neither_lose_nor_double_phones(factor: int, batch_seconds: float) -> None:
    audio = babble(31.3)
    (whole,) = recognizer(factor, window=60.0).transcribe(audio)
    windowed = recognizer(factor, window=4.0, overlap=1.0, batch_seconds=batch_seconds, split="windows")
    (cut,) = windowed.transcribe(audio)
    assert len(whole.phones) > 100
    assert cut.phones == whole.phones
    assert cut.duration == whole.duration == 31.3
    for name in ("starts", "ends", "confidence"):
        assert np.allclose(getattr(cut, name), getattr(whole, name), atol=2e-3), name
    assert cut.score == pytest.approx(whole.score, rel=1e-4)
    model: Any = windowed.recogniser
    assert max(max(batch) for batch in model.batches) <= 400


def test_results_come_in_order_whatever_the_lengths() -> None:
    lengths = [3.0, 0.5, 7.7, 1.0, 0.3, 5.0]
    arrays = [babble(seconds, seed) for seed, seconds in enumerate(lengths)]
    model = recognizer(window=4.0, overlap=1.0, batch_seconds=6.0)
    together = model.transcribe(arrays)
    assert [result.duration for result in together] == pytest.approx(lengths)
    assert [result.id for result in together] == [f"array-{n}" for n in range(6)]
    alone = [model.transcribe(array)[0] for array in arrays]
    assert [result.phones for result in together] == [result.phones for result in alone]
    batches: Any = model.recogniser
    assert all(list(batch) == sorted(batch, reverse=True) for batch in batches.batches)
    assert max(len(batch) * max(batch) for batch in batches.batches) <= 600


@dataclass
class Hours:
    """Ten hours of a recording, made as they are read: each block is ten seconds."""

    block: np.ndarray
    given: int = 0
    warning: str | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        for _ in range(3600):
            yield self.block
            self.given += 10


SPEECH = np.tile(np.repeat(np.array([1.0, 0.0], np.float32), [9 * RATE // 2, RATE // 2]), 2)


@pytest.mark.parametrize(("block", "longest"), [(np.zeros(10 * RATE, np.float32), 30.0), (SPEECH, 5.0)])
def test_ten_hours_are_read_as_they_are_needed(
    block: np.ndarray, longest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held does not grow with the recording, whether there are pauses or not."""
    stream, ahead, passed = Hours(block), [0.0], [0.0]
    model = recognizer(window=30.0, overlap=4.0, batch_seconds=600.0)
    # The features of a frame are one of its samples, and few, for speed.
    monkeypatch.setattr(model, "_fbank", lambda samples: samples[79::160, None].expand(-1, 2))

    def log_probs_of(features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        ahead.append(stream.given - passed[0])
        seconds = num_frames / 100
        assert float(seconds.max()) <= longest + 0.5
        passed[0] += float(torch.where(seconds == 30.0, 26.0, seconds).sum())
        lengths = (num_frames - 7) // 2
        log_probs = torch.full((len(features), int(lengths.max()), 9), -9.0)
        log_probs[..., 0] = 0.0
        return log_probs, lengths

    monkeypatch.setattr(model.recogniser, "log_probs_of", log_probs_of)
    held: list[int] = []
    add = transcriber.Stitcher.add

    def counted(self: transcriber.Stitcher, log_probs: Tensor, start: int, last: bool) -> Iterator[Any]:
        yield from add(self, log_probs, start, last)
        held.append(0 if self._held is None else len(self._held))

    monkeypatch.setattr(transcriber.Stitcher, "add", counted)
    (result,) = model.stream([Source("hours", "", stream)])
    assert result.duration == 36_000.0 and result.phones == [] and result.problem is None
    assert max(ahead) <= 600 * transcriber.POOL_BATCHES + 60
    assert max(held) <= 2 * 30 * 50 + 30 * 50


def test_a_recording_that_fails_half_way_gives_a_problem_and_no_phones() -> None:
    class Broken:
        warning: str | None = None

        def __iter__(self) -> Iterator[np.ndarray]:
            yield babble(9.0)
            raise transcriber.AudioError("torn")

    model = recognizer(window=4.0, overlap=1.0, batch_seconds=1.0)
    other = babble(2.0, 1)
    (result,) = model.transcribe(other)
    sources = [Source("bad", "bad.wav", Broken()), Source("good", "", _Blocks(other))]
    bad, good = model.stream(sources)
    assert bad.problem == "torn" and bad.phones == []
    assert good.phones == result.phones


class _Blocks:
    warning: str | None = None

    def __init__(self, samples: np.ndarray) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self.samples


def test_rates_channels_and_integers_make_no_difference(tmp_path: Path) -> None:
    audio = babble(2.0)
    model = recognizer()
    (want,) = model.transcribe(audio)
    pcm = (audio * 32767).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", pcm, RATE)
    soundfile.write(tmp_path / "a.flac", np.stack([pcm, np.zeros_like(pcm), pcm], axis=1), RATE)
    (by_file,) = model.transcribe(tmp_path / "a.wav")
    (by_array,) = model.transcribe(pcm)
    (by_channel,) = model.transcribe(str(tmp_path / "a.flac"), channel=3)
    assert by_file.phones == by_array.phones == by_channel.phones
    assert len(want.phones) == len(by_file.phones)
    (absent,) = model.transcribe(tmp_path / "a.flac", channel=4)
    assert absent.problem == "has 3 channels, so there is no channel 4"
    (unsigned,) = model.transcribe(np.zeros(RATE, np.uint8))
    assert unsigned.problem is not None and "uint8" in unsigned.problem


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap of 3 s: the overlap must be above 0 and below half"):
        recognizer(window=5.0, overlap=3.0)
    with pytest.raises(ValueError, match="batch_seconds: 0"):
        recognizer(batch_seconds=0)
    with pytest.raises(ValueError, match="split: silence; must be pauses or windows"):
        recognizer(split="silence")
    with pytest.raises(ValueError, match=r"min_pause: 0\.1 s; must be at least 0\.2 s"):
        recognizer(min_pause=0.1)
    with pytest.raises(ValueError, match="shape"):
        recognizer().transcribe(np.zeros((2, 2, 2)))


def test_long_and_short_through_a_real_model(tmp_path: Path) -> None:
    """Utterances that fit into a window get exactly what they get alone."""
    model = PhoneRecognizer.from_pretrained(
        write_checkpoint(tmp_path / "model.pt"), device="cpu", window=3.0, overlap=0.6, batch_seconds=9.0
    )
    assert isinstance(model.recogniser, Recogniser)
    arrays = [babble(seconds, seed) for seed, seconds in enumerate([1.0, 2.9, 0.4, 8.0])]
    together = model.transcribe(arrays)
    assert [result.problem for result in together] == [None] * 4
    for array, result in zip(arrays, together, strict=True):
        (alone,) = model.transcribe(array)
        assert alone.phones == result.phones
        assert alone.score == pytest.approx(result.score, abs=1e-2)
    assert together[-1].ends[-1] <= 8.0 if together[-1].ends else True


@pytest.mark.parametrize("flags", [(), ("--causal", "True", "--chunk-size", "16", "--left-context-frames", "64")])
def test_a_long_recording_with_pauses_is_its_utterances(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Each stretch is heard as if it were alone, at its place in time; nothing lies between two."""
    path = write_checkpoint(tmp_path / "model.pt", flags=flags)
    model = PhoneRecognizer.from_pretrained(path, device="cpu", window=4.0, overlap=0.6, batch_seconds=9.0)
    rng = np.random.default_rng(0)
    parts: list[np.ndarray] = []
    for seed, seconds in enumerate([1.5, 0.8, 3.0, 0.7, 7.0, 2.0]):
        parts += [babble(seconds, seed), np.zeros(int(rng.uniform(0.35, 0.5) * RATE), np.float32)]
    audio = np.concatenate(parts)
    audio += 1e-3 * rng.standard_normal(len(audio)).astype(np.float32)
    windows = list(model._cutter().windows([audio]))
    assert sum(window.first for window in windows) >= 6 and any(not window.last for window in windows)
    starts = [window.start for window in windows if window.first]
    starts.append(windows[-1].start + len(windows[-1].samples))
    (together,) = model.transcribe(audio)
    single = PhoneRecognizer(model.recogniser, window=4.0, overlap=0.6, split="windows")
    alone = [single.transcribe(audio[begin:end])[0] for begin, end in pairwise(starts)]
    assert together.phones == [phone for result in alone for phone in result.phones]
    want = [begin / RATE + start for begin, result in zip(starts, alone, strict=False) for start in result.starts]
    assert np.abs(np.array(together.starts) - want).max() < 0.3  # edges of phones follow those before and after them
    assert together.starts == sorted(together.starts) and together.ends == sorted(together.ends)
    assert together.score == pytest.approx(sum(result.score or 0.0 for result in alone), abs=1e-2)


def test_long_pauses_are_left_out_and_keep_their_time() -> None:
    rng = np.random.default_rng(0)
    first, second = babble(3.0), babble(2.0, 1)
    audio = np.concatenate([first, np.zeros(10 * RATE, np.float32), second, np.zeros(9 * RATE, np.float32)])
    audio += 1e-3 * rng.standard_normal(len(audio)).astype(np.float32)
    model = recognizer(window=8.0, overlap=1.0)
    (result,) = model.transcribe(audio)
    assert result.duration == 24.0 and result.silence == pytest.approx(10.0 - 0.6 + 9.0 - 0.3, abs=0.2)
    model_heard: Any = model.recogniser
    assert sum(frames for batch in model_heard.batches for frames in batch) / 100 == pytest.approx(
        24.0 - result.silence, abs=0.05
    )
    middles = (np.array(result.starts) + result.ends) / 2
    assert ((middles < 3.4) | ((middles > 12.6) & (middles < 15.4))).all()
    assert (middles < 3.0).sum() > 10 and (middles > 13.0).sum() > 10


def test_windows_can_be_had_in_spite_of_pauses() -> None:
    audio = np.concatenate([babble(3.0), np.zeros(RATE, np.float32), babble(3.0, 1)])
    model = recognizer(window=4.0, overlap=1.0, split="windows")
    model.transcribe(audio)
    batches: Any = model.recogniser
    assert sorted(frames for batch in batches.batches for frames in batch) == [396, 400]


def test_a_causal_model_takes_the_widest_chunks_unless_told(tmp_path: Path) -> None:
    flags = ("--causal", "True", "--chunk-size", "16,32", "--left-context-frames", "64,128")
    path = write_checkpoint(tmp_path / "causal.pt", flags=flags)
    model = PhoneRecognizer.from_pretrained(path, device="cpu")
    assert model.recogniser.config.chunk_size == (32,) and model.recogniser.config.left_context_frames == (128,)
    told = PhoneRecognizer.from_pretrained(path, device="cpu", chunk_size=16, window=3.0, overlap=0.6)
    assert told.recogniser.config.chunk_size == (16,)
    (result,) = told.transcribe(babble(5.0))
    assert result.problem is None and result.duration == 5.0
    with pytest.raises(ValueError, match="chunk_size 16: the model is not causal"):
        PhoneRecognizer.from_pretrained(write_checkpoint(tmp_path / "other.pt"), device="cpu", chunk_size=16)


def test_an_inventory_holds_for_the_recogniser_that_it_makes() -> None:
    every = recognizer()
    (heard,) = every.transcribe(babble(3.0))
    forbidden = heard.phones[0]
    phones = inventory_phones(torch.ones(TOKENIZER.vocab_size, dtype=torch.bool), TOKENIZER)
    few = every.with_inventory(" ".join(phone for phone in phones if phone != forbidden))
    (without,) = few.transcribe(babble(3.0))
    assert without.phones and forbidden not in without.phones
    assert every.transcribe(babble(3.0)) == [heard]
    with pytest.raises(ValueError, match=r"cannot write these phones: PH \(line 1\)"):
        every.with_inventory("PH")
