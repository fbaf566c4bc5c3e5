"""A checkpoint with the published keys gives the same on the command line, from Python, in ONNX and in transformers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

# Nothing is asked for on the network, and the small file of remote code is copied to a folder of this run.
os.environ["HF_HUB_OFFLINE"] = "1"

from small_models import draw_parameters
from zipformer_crctc import cli
from zipformer_crctc.features import Fbank
from zipformer_crctc.model import build_model
from zipformer_crctc.onnx_model import OnnxModel
from zipformer_crctc.presets import PRESETS
from zipformer_crctc.tokenizer import PhoneTokenizer
from zipformer_crctc.transcriber import PhoneRecognizer

PRESET = os.environ.get("INTERFACES_PRESET", "small")
"""`large` takes minutes and 8 GiB of memory."""
TOLERANCE = 1e-3
"""On log-probabilities."""


@dataclass(frozen=True)
class Case:
    """A model, an utterance, and what Python gives for it."""

    checkpoint: Path
    audio: Path
    samples: np.ndarray
    recognizer: PhoneRecognizer
    log_probs: Tensor
    """(T', V)."""

    def flags(self, folder: Path) -> list[str]:
        """Of the programs that write the model in another form."""
        return ["--checkpoint", str(self.checkpoint), "--device", "cpu", "--output-dir", str(folder)]


@pytest.fixture(scope="module")
@torch.inference_mode()
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two seconds of sound, and random weights that stand alone in their file as those that were published do."""
    folder = tmp_path_factory.mktemp("published")
    model = draw_parameters(build_model(PRESETS[PRESET]().model, PhoneTokenizer.from_table().vocab_size), 0.05)
    torch.save({"model": model.state_dict()}, folder / "model.pt")
    noise = np.random.default_rng(0).standard_normal(32_000).cumsum()
    soundfile.write(folder / "sound.wav", 0.1 * np.sin(noise), 16_000, subtype="PCM_16")
    samples, _ = soundfile.read(folder / "sound.wav", dtype="float32")
    features = Fbank()(torch.from_numpy(samples))[None]
    recognizer = PhoneRecognizer.from_pretrained(folder / "model.pt", device="cpu")
    want, _ = model.eval()(features, torch.tensor([features.shape[1]]))
    return Case(folder / "model.pt", folder / "sound.wav", samples, recognizer, want[0])


def largest(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max())


@torch.inference_mode()
def test_python(case: Case) -> None:
    assert case.recognizer.recogniser.config == PRESETS[PRESET]().model
    features = Fbank()(torch.from_numpy(case.samples))[None]
    got, _ = case.recognizer.recogniser.log_probs_of(features, torch.tensor([features.shape[1]]))
    assert largest(got[0], case.log_probs) < TOLERANCE


def test_the_command_line(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """The score is the sum of the log-probs of the best path."""
    (want,) = case.recognizer.transcribe(case.samples)
    flags = ["--model", str(case.checkpoint), "--device", "cpu", "--output-formats", "jsonl"]
    cli.main(["transcribe", *flags, str(case.audio)])
    got = json.loads(capsys.readouterr().out)
    assert got["phones"] == want.phones != []
    assert got["score"] == pytest.approx(float(case.log_probs.max(dim=1).values.sum()), abs=TOLERANCE * 100)
    assert got["confidence"] == pytest.approx(want.confidence, abs=TOLERANCE)


def test_onnx(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed: pip install '.[onnx]'")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install '.[onnx]'")
    cli.main(["export-onnx", *case.flags(tmp_path), "--precisions", "fp32"])
    features = Fbank()(torch.from_numpy(case.samples))[None]
    got, _ = OnnxModel(tmp_path / "model.onnx")(features, torch.tensor([features.shape[1]]))
    assert largest(got[0], case.log_probs) < TOLERANCE


@torch.inference_mode()
def test_transformers(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    cli.main(["save-pretrained", *case.flags(tmp_path / "model")])
    model = transformers.AutoModelForCTC.from_pretrained(tmp_path / "model", trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "model", trust_remote_code=True)
    got = model(**processor(case.samples, sampling_rate=16_000)).logits
    assert largest(got[0], case.log_probs) < TOLERANCE
