"""A folder for transformers: loaded by its own classes it finds the phones that decoding finds."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Nothing is asked for on the network, and the small file of remote code is copied to a folder of this run.
os.environ["HF_HUB_OFFLINE"] = "1"

from small_models import SMALL_MODEL, draw_parameters, small_model
from zipformer_crctc.features import Fbank
from zipformer_crctc.modelcard import model_card
from zipformer_crctc.pretrained import find_weights
from zipformer_crctc.recogniser import Recogniser, build_recogniser
from zipformer_crctc.save_pretrained import REMOTE_CODE, read_summaries, save_pretrained
from zipformer_crctc.search import greedy_search
from zipformer_crctc.tokenizer import PhoneTokenizer

SUMMARY = """# tones

| language | utterances | phones | PER % | ins |
| --- | ---: | ---: | ---: | ---: |
| de | 4 | 353 | 3.40 | 1 |
| ta | 4 | 431 | 6.03 | 9 |
| total | 8 | 784 | 4.85 | 10 |
"""


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    """Random weights that let every part matter."""
    tokenizer = PhoneTokenizer.from_table()
    return Recogniser(draw_parameters(small_model(tokenizer.vocab_size), 0.3).eval(), tokenizer, SMALL_MODEL)


@pytest.fixture(scope="module")
def loaded(recogniser: Recogniser, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """Model, processor and folder."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")
    cache = tmp_path_factory.mktemp("modules")
    patch = pytest.MonkeyPatch()
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    folder = tmp_path_factory.mktemp("model") / "tones"
    save_pretrained(recogniser, folder, "# tones\n")
    model = transformers.AutoModelForCTC.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    patch.undo()
    return model.eval(), processor, folder


@pytest.fixture
def waveforms() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [0.1 * np.sin(generator.standard_normal(count).cumsum()).astype(np.float32) for count in (20_000, 9_000)]


def phones(recogniser: Recogniser, waveform: np.ndarray) -> list[str]:
    """What decoding finds in an utterance by itself."""
    features = Fbank()(torch.from_numpy(waveform))[None]
    with torch.inference_mode():
        found = greedy_search(*recogniser.model(features, torch.tensor([features.shape[1]])))
    return recogniser.tokenizer.phones(found[0].tokens)


def test_weights_are_those_of_the_model_in_safetensors(recogniser: Recogniser, loaded: tuple[Any, Any, Path]) -> None:
    model, _, folder = loaded
    assert {"README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.model"} <= {
        path.name for path in folder.iterdir()
    }
    want = recogniser.model.state_dict()
    got = model.model.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_the_folder_is_a_model_for_transcription(recogniser: Recogniser, loaded: tuple[Any, Any, Path]) -> None:
    """Heads and kernels of this model are not those that the tensors alone would tell."""
    weights = find_weights(loaded[2])
    assert weights.config == recogniser.config
    ours = build_recogniser(weights, {}, device="cpu")
    assert ours.tokenizer.pieces == recogniser.tokenizer.pieces
    want = recogniser.model.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in ours.model.state_dict().items())


def test_the_usual_lines_find_the_phones_of_decoding(
    recogniser: Recogniser, loaded: tuple[Any, Any, Path], waveforms: list[np.ndarray]
) -> None:
    model, processor, _ = loaded
    inputs = processor(waveforms, sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits
    found = processor.batch_decode(logits.argmax(dim=-1))
    want = [phones(recogniser, waveform) for waveform in waveforms]
    assert all(want)
    assert [text.split() for text in found] == want
    # One array by itself, and by numpy.
    alone = processor(waveforms[1], sampling_rate=16_000)
    with torch.inference_mode():
        ids = model(**alone).logits.argmax(dim=-1).numpy()
    assert processor.decode(ids[0]).split() == want[1]


def test_a_causal_model_hears_the_end_of_each_utterance(waveforms: list[np.ndarray]) -> None:
    hf = pytest.importorskip("zipformer_crctc.hf", reason="transformers is not installed: pip install '.[hf]'")
    sizes = {"causal": True, "chunk_size": (16,), "left_context_frames": (32,)}
    tokenizer = PhoneTokenizer.from_table()
    causal = draw_parameters(small_model(tokenizer.vocab_size, **sizes), 0.3).eval()
    recogniser = Recogniser(causal, tokenizer, SMALL_MODEL.with_values(sizes))
    model, processor = hf.to_transformers(recogniser)
    with torch.inference_mode():
        logits = model(**processor(waveforms, sampling_rate=16_000)).logits
        for row, waveform in zip(logits, waveforms, strict=True):
            features = Fbank()(torch.from_numpy(waveform))[None]
            want, _ = recogniser.log_probs_of(features, torch.tensor([features.shape[1]]))
            assert float((row[: want.shape[1]] - want[0]).abs().max()) < 1e-4


def test_features_are_ours(loaded: tuple[Any, Any, Path], waveforms: list[np.ndarray]) -> None:
    inputs = loaded[1](waveforms, return_tensors="np")
    for row, mask, waveform in zip(inputs["input_features"], inputs["attention_mask"], waveforms, strict=True):
        want = Fbank()(torch.from_numpy(waveform)).numpy()
        assert np.array_equal(row[: len(want)], want)
        assert mask.sum() == len(want)


def test_audio_that_does_not_fit_is_refused(loaded: tuple[Any, Any, Path], waveforms: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="8000: the model hears 16000 Hz"):
        loaded[1](waveforms, sampling_rate=8000)
    with pytest.raises(ValueError, match=r"audio 1: 0\.050 s are too short"):
        loaded[1]([waveforms[0], np.zeros(800, dtype=np.float32)])


def test_without_the_package_the_folder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zipformer_crctc.hf", None)
    with pytest.raises(ImportError, match=r"needs the package zipformer_crctc .* pip install '\.\[hf\]'"):
        exec(REMOTE_CODE, {})


def test_model_card(recogniser: Recogniser, tmp_path: Path) -> None:
    (tmp_path / "summary-tones-iter-9-avg-1.md").write_text(SUMMARY, encoding="utf-8")
    (tmp_path / "summary-tones-iter-8-avg-1.md").write_text("# other\n", encoding="utf-8")
    summaries = read_summaries(tmp_path, "iter-9-avg-1")
    card = model_card(recogniser, "tones-small", "cc-by-4.0", (), summaries)
    front = card.split("---\n")[1]
    assert "license: cc-by-4.0" in front
    assert 'language: ["de", "ta"]' in front
    assert "value: 4.85" in front
    assert "| ta | 4 | 431 | 6.03 | 9 |" in card
    assert "Not known" in model_card(recogniser, "tones-small", "cc-by-4.0", ("de",), {})
