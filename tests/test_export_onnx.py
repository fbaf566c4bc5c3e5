"""ONNX files: they give what the model gives, alone and in batches, and sherpa-onnx runs them."""

from __future__ import annotations

from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from small_models import SMALL_MODEL, draw_parameters
from zipformer_crctc import checkpoint, export_onnx
from zipformer_crctc.config import Config, config_to_dict
from zipformer_crctc.exportable import FbankGraph, exportable_operations
from zipformer_crctc.features import LOG_EPS, Fbank
from zipformer_crctc.model import build_model
from zipformer_crctc.onnx_files import file_name, write_onnx, write_tokens
from zipformer_crctc.onnx_model import OnnxModel
from zipformer_crctc.recogniser import Recogniser
from zipformer_crctc.search import greedy_search
from zipformer_crctc.tokenizer import PhoneTokenizer

pytest.importorskip("onnx", reason="onnx is not installed: pip install '.[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install '.[onnx]'")

MODEL = SMALL_MODEL.with_values(
    {
        "downsampling_factor": (1, 4, 2),
        "encoder_dim": (24, 40, 32),
        "cnn_module_kernel": (7, 5, 7),
        "output_downsampling_factor": 2,
    }
)
NUM_SAMPLES = (24_000, 1360, 15_987, 8_000)
"""The second gives 9 frames, the fewest."""


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    """Three stacks, output at 25 Hz, random weights that let every part matter."""
    tokenizer = PhoneTokenizer.from_table()
    model = draw_parameters(build_model(MODEL, tokenizer.vocab_size), 0.3).eval()
    return Recogniser(model, tokenizer, MODEL)


@pytest.fixture(scope="module")
def waveforms() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [0.1 * torch.randn(count, generator=generator).cumsum(0).sin() for count in NUM_SAMPLES]


@pytest.fixture(scope="module")
def files(recogniser: Recogniser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of every precision that takes features, and fp32 that takes audio."""
    folder = tmp_path_factory.mktemp("onnx")
    for precision in ("fp32", "fp16", "int8"):
        write_onnx(recogniser, folder / file_name("features", precision), "features", precision)
    write_onnx(recogniser, folder / file_name("audio", "fp32"), "audio")
    write_tokens(recogniser, folder / "tokens.txt")
    return folder


@torch.inference_mode()
def alone(recogniser: Recogniser, waveform: Tensor) -> Tensor:
    """Log-probs (T', V) of an utterance by itself, as published."""
    features = Fbank()(waveform)[None]
    return recogniser.model(features, torch.tensor([features.shape[1]]))[0][0]


def largest(got: Tensor, lengths: Tensor, want: list[Tensor]) -> float:
    assert lengths.tolist() == [len(one) for one in want]
    return max(float((row[: len(one)] - one).abs().max()) for row, one in zip(got, want, strict=True))


def padded(rows: list[Tensor], value: float = 0.0) -> tuple[Tensor, Tensor]:
    return pad_sequence(rows, batch_first=True, padding_value=value), torch.tensor([len(row) for row in rows])


def weight_bytes(path: Path) -> int:
    import onnx

    return sum(len(tensor.raw_data) for tensor in onnx.load(str(path)).graph.initializer)


def test_fp32_gives_each_utterance_of_a_batch_what_the_model_gives_it_alone(
    recogniser: Recogniser, files: Path, waveforms: list[Tensor]
) -> None:
    model = OnnxModel(files / "model.onnx", num_threads=1)
    want = [alone(recogniser, waveform) for waveform in waveforms]
    log_probs, lengths = model(*padded([Fbank()(waveform) for waveform in waveforms], LOG_EPS))
    assert largest(log_probs, lengths, want) < 1e-4
    phones = [best.tokens for best in greedy_search(log_probs, lengths)]
    assert phones == [greedy_search(one[None], torch.tensor([len(one)]))[0].tokens for one in want]
    assert all(phones)
    for waveform, one in zip(waveforms, want, strict=True):
        assert largest(*model(*padded([Fbank()(waveform)])), [one]) < 1e-4


def test_the_graph_with_features_takes_samples(recogniser: Recogniser, files: Path, waveforms: list[Tensor]) -> None:
    model = OnnxModel(files / "model-audio.onnx", num_threads=1)
    want = [alone(recogniser, waveform) for waveform in waveforms]
    assert largest(*model(*padded(waveforms)), want) < 1e-3
    assert model.metadata["inputs"] == "audio"


def test_features_of_a_batch_are_those_of_each_waveform(waveforms: list[Tensor]) -> None:
    samples, lengths = padded(waveforms)
    for got, waveform in zip(FbankGraph()(samples, lengths), waveforms, strict=True):
        want = Fbank()(waveform)
        assert float((got[: len(want)] - want).abs().max()) < 2e-3


@pytest.mark.parametrize(("precision", "share", "limit"), [("fp16", 0.55, 0.05), ("int8", 0.55, 0.5)])
def test_smaller_files_are_close(
    recogniser: Recogniser, files: Path, waveforms: list[Tensor], precision: str, share: float, limit: float
) -> None:
    path = files / file_name("features", precision)
    assert weight_bytes(path) < share * weight_bytes(files / "model.onnx")
    log_probs, lengths = OnnxModel(path, num_threads=1)(*padded([Fbank()(one) for one in waveforms], LOG_EPS))
    assert log_probs.dtype == torch.float32
    want = [alone(recogniser, waveform) for waveform in waveforms]
    differences = [(row[: len(one)] - one).abs().mean() for row, one in zip(log_probs, want, strict=True)]
    assert float(torch.stack(differences).mean()) < limit
    assert lengths.tolist() == [len(one) for one in want]


def test_metadata_and_tokens(recogniser: Recogniser, files: Path) -> None:
    model = OnnxModel(files / "model.int8.onnx", num_threads=1)
    assert model.metadata["model_type"] == "zipformer2_ctc"
    assert model.metadata["version"] == "1"
    assert model.factor == 2
    lines = (files / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert lines[:4] == ["<blk> 0", "<sos/eos> 1", "<unk> 2", "▁ 3"]
    assert [line.split(" ") for line in lines] == [[p, str(i)] for i, p in enumerate(recogniser.tokenizer.pieces)]
    assert model.metadata["pieces"].split(" ") == list(recogniser.tokenizer.pieces)


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx"])
def test_sherpa_onnx_finds_the_same_phones(
    recogniser: Recogniser, files: Path, waveforms: list[Tensor], tmp_path: Path, name: str
) -> None:
    """With 8-bit arithmetic the slightest difference between the features can turn a symbol, so most are enough."""
    sherpa_onnx = pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed: pip install sherpa-onnx")
    sherpa = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(
        model=str(files / name), tokens=str(files / "tokens.txt"), num_threads=1
    )
    ours = OnnxModel(files / name, num_threads=1)
    for i, waveform in enumerate([waveforms[0], waveforms[3]]):
        soundfile.write(tmp_path / f"{i}.wav", waveform.numpy(), 16_000, subtype="PCM_16")
        samples, rate = soundfile.read(tmp_path / f"{i}.wav", dtype="float32")
        stream = sherpa.create_stream()
        stream.accept_waveform(rate, samples)
        sherpa.decode_stream(stream)
        log_probs, lengths = ours(*padded([Fbank()(torch.from_numpy(samples))]))
        want = recogniser.tokenizer.phones(greedy_search(log_probs, lengths)[0].tokens)
        found = [token for token in stream.result.tokens if token.strip(" ▁")]
        share = SequenceMatcher(None, found, want, autojunk=False).ratio()
        assert share >= (0.8 if "int8" in name else 1.0)
        assert want


def test_the_model_is_itself_again_afterwards(recogniser: Recogniser, waveforms: list[Tensor]) -> None:
    before = alone(recogniser, waveforms[0])
    with exportable_operations(), torch.inference_mode():
        features = Fbank()(waveforms[0])[None]
        inside, _ = recogniser.model(features, torch.tensor([features.shape[1]]), isolate=True)
    assert torch.equal(alone(recogniser, waveforms[0]), before)
    assert float((inside[0] - before).abs().max()) < 1e-4
    with pytest.raises(ValueError, match="at least 9"):
        recogniser.model(torch.zeros(1, 5, 80), torch.tensor([5]))


@pytest.mark.parametrize("inputs", ["features", "audio"])
@pytest.mark.parametrize("chunk_size", [-1, 16, 128])
def test_a_causal_model_takes_whole_utterances_in_its_chunks(
    chunk_size: int, inputs: str, waveforms: list[Tensor], tmp_path: Path
) -> None:
    """128 frames are longer than the utterances that the graph is made with, and than all of these but the last."""
    config = MODEL.with_values({"causal": True, "chunk_size": (chunk_size,), "left_context_frames": (32,)})
    tokenizer = PhoneTokenizer.from_table()
    model = draw_parameters(build_model(config, tokenizer.vocab_size), 0.3).eval()
    causal = Recogniser(model, tokenizer, config)
    write_onnx(causal, tmp_path / "model.onnx", inputs)
    long = [*waveforms, torch.cat([waveforms[0], waveforms[2], waveforms[3]])]
    features = [Fbank()(waveform) for waveform in long]
    with torch.inference_mode():
        want = [causal.log_probs_of(one[None], torch.tensor([len(one)]))[0][0] for one in features]
    given = padded(features, LOG_EPS) if inputs == "features" else padded(long)
    assert largest(*OnnxModel(tmp_path / "model.onnx", num_threads=1)(*given), want) < 1e-3


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = PhoneTokenizer.from_table()
    state = build_model(MODEL, tokenizer.vocab_size).state_dict()
    saved = {"model": state, "config": config_to_dict(Config(MODEL)), "tokenizer": tokenizer.proto}
    checkpoint.save(tmp_path / "model.pt", saved)
    flags = ["--checkpoint", str(tmp_path / "model.pt"), "--device", "cpu", "--num-threads", "1"]
    export_onnx.main([*flags, "--precisions", "fp32", "--inputs", "audio"])
    model = OnnxModel(tmp_path / "onnx" / "model-audio.onnx", num_threads=1)
    log_probs, lengths = model(torch.from_numpy(np.zeros((1, 16_000), dtype=np.float32)), torch.tensor([16_000]))
    assert log_probs.shape == (1, 23, tokenizer.vocab_size)
    assert lengths.tolist() == [23]
    with pytest.raises(SystemExit) as stopped:
        export_onnx.main([*flags, "--precisions", "fp32,int4"])
    assert stopped.value.code == 2
    assert "--precisions int4: must be of fp32, fp16, int8." in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"export_onnx\.py writes"):
        OnnxModel(tmp_path / "none.onnx")
