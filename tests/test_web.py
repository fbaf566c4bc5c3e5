"""The page of docs/web in a browser: files and the microphone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from browser import Page, needs_chromium
from small_models import SMALL_MODEL, draw_parameters
from webpage import BUILD, NOTHING_FETCHED, load, record, served, transcribe
from zipformer_crctc.model import build_model
from zipformer_crctc.onnx_files import write_onnx, write_tokens
from zipformer_crctc.recogniser import Recogniser
from zipformer_crctc.tokenizer import PhoneTokenizer
from zipformer_crctc.transcriber import PhoneRecognizer

pytest.importorskip("onnx", reason="onnx is not installed: pip install '.[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install '.[onnx]'")
pytestmark = [needs_chromium, pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")]

MODEL = SMALL_MODEL.with_values(
    {
        "downsampling_factor": (1, 2),
        "encoder_dim": (24, 32),
        "cnn_module_kernel": (7, 5),
        "output_downsampling_factor": 2,
    }
)
RATE = 16_000


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    tokenizer = PhoneTokenizer.from_table()
    return Recogniser(draw_parameters(build_model(MODEL, tokenizer.vocab_size), 0.3).eval(), tokenizer, MODEL)


@pytest.fixture(scope="module")
def folder(recogniser: Recogniser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built page."""
    base = tmp_path_factory.mktemp("web")
    write_onnx(recogniser, base / "model-audio.onnx", "audio")
    write_tokens(recogniser, base / "tokens.txt")
    built = subprocess.run([BUILD, base / "model-audio.onnx", base / "page"], capture_output=True, text=True)
    if built.returncode == NOTHING_FETCHED:
        pytest.skip(built.stderr.strip())
    assert built.returncode == 0, built.stderr
    return base / "page"


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audio") / "noise.wav"
    noise = np.sin(0.1 * np.random.default_rng(3).standard_normal(3 * RATE).cumsum())
    # Browsers scale whole numbers a little differently, which can turn a phone that is a tie.
    soundfile.write(path, 0.5 * noise, RATE, subtype="FLOAT")
    return path


def test_the_page_hears_what_the_model_hears(recogniser: Recogniser, folder: Path, recording: Path) -> None:
    """Phones of a file equal those of Python; a microphone gives some; bad files are named; all is in the folder."""
    (want,) = PhoneRecognizer(recogniser).transcribe(str(recording))
    bad = recording.with_name("text.wav")
    bad.write_text("no audio")
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with served(folder) as url, Page(*flags, f"--use-file-for-fake-audio-capture={recording}") as page:
        load(page, url)
        assert want.phones and transcribe(page, recording) == "".join(want.phones)
        assert record(page, 1.0)
        with pytest.raises(AssertionError, match="Failed: "):
            transcribe(page, bad)
        assert page.text("#status.failed").startswith("Failed: ")
        assert [address for address in page.requests if not address.startswith((url, "data:", "blob:"))] == []
        assert page.errors == []


def test_build_names_what_is_missing(tmp_path: Path) -> None:
    built = subprocess.run([BUILD, "model.onnx"], capture_output=True, text=True)
    assert built.returncode == 1 and "usage: " in built.stderr
