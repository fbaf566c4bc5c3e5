"""A model as ONNX files that onnxruntime and sherpa-onnx run; the only module that writes them.

N utterances, T feature frames or samples, T' output frames, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from zipformer_crctc.exportable import AudioGraph, FeatureGraph, exportable_operations
from zipformer_crctc.features import FRAME_SHIFT, LOG_EPS, NUM_BINS, SAMPLING_RATE
from zipformer_crctc.norms import BiasNorm
from zipformer_crctc.recogniser import Recogniser

PRECISIONS = ("fp32", "fp16", "int8")
INPUTS: dict[str, type[AudioGraph | FeatureGraph]] = {"features": FeatureGraph, "audio": AudioGraph}
OUTPUT_NAMES = ("log_probs", "log_probs_len")
OPSET = 17


def file_name(inputs: str, precision: str) -> str:
    """model.onnx, model.int8.onnx, ...; model-audio.onnx, ... where the features are in the graph."""
    stem = "model" if inputs == "features" else f"model-{inputs}"
    return f"{stem}.onnx" if precision == "fp32" else f"{stem}.{precision}.onnx"


def write_onnx(recogniser: Recogniser, path: Path, inputs: str = "features", precision: str = "fp32") -> None:
    """Write one file.

    Inputs `x` (N, T, 80) and `x_lens` (N,), or `audio` (N, T) and `audio_lens` (N,); outputs `log_probs` (N, T', V),
    float32 in every precision, and `log_probs_len` (N,). N and T are free; each utterance gets what it gets alone.

    Args:
        recogniser: a model on any device; it is not changed. A causal one is asked for whole utterances, with its
            chunk size and left context.
        path: the file.
        inputs: one of INPUTS.
        precision: one of PRECISIONS; int8 has 8-bit weights in the matrix products, and activations quantised as they
            come.

    Raises:
        ValueError: a package that is missing.
    """
    _require_packages()
    metadata = {name: str(value) for name, value in _metadata(recogniser, inputs).items()}
    if precision != "int8":
        _export(recogniser, path, inputs, precision, metadata)
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        plain = Path(folder) / "fp32.onnx"
        _export(recogniser, plain, inputs, "fp32", metadata)
        _quantise(plain, path)


def write_tokens(recogniser: Recogniser, path: Path) -> None:
    """The table `piece id` that sherpa-onnx reads."""
    lines = [f"{piece} {i}\n" for i, piece in enumerate(recogniser.tokenizer.pieces)]
    path.write_text("".join(lines), encoding="utf-8")


def _metadata(recogniser: Recogniser, inputs: str) -> dict[str, Any]:
    """What sherpa-onnx asks for, and what a reader of the file needs besides."""
    return {
        "model_type": "zipformer2_ctc",
        "version": 1,
        "model_author": "zipformer_crctc",
        "comment": "CR-CTC phone recogniser: log-probabilities of IPA symbols, blank 0",
        "inputs": inputs,
        "sample_rate": SAMPLING_RATE,
        "feature_dim": NUM_BINS,
        "vocab_size": recogniser.tokenizer.vocab_size,
        "blank_id": recogniser.tokenizer.blank_id,
        "subsampling_factor": 2 * recogniser.factor,
        "pieces": " ".join(recogniser.tokenizer.pieces),
    }


def example(inputs: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two made-up utterances of different length, as a graph of this kind takes them."""
    generator = torch.Generator().manual_seed(0)
    num_frames = torch.tensor([203, 150])
    if inputs == "audio":
        num_samples = num_frames * FRAME_SHIFT
        return 0.1 * torch.randn((2, int(num_samples.max())), generator=generator), num_samples
    features = 2.0 * torch.randn((2, 203, NUM_BINS), generator=generator) - 6.0
    features[1, 150:] = LOG_EPS
    return features, num_frames


def _export(recogniser: Recogniser, path: Path, inputs: str, precision: str, metadata: dict[str, str]) -> None:
    import onnx

    model = copy.deepcopy(recogniser.model).cpu().to(torch.float16 if precision == "fp16" else torch.float32)
    for module in model.modules():
        if isinstance(module, BiasNorm):  # its arithmetic is in float32 always
            module.float()
    graph = INPUTS[inputs](model).eval()
    data, lengths = graph.input_names
    axes = {
        data: {0: "N", 1: "T"},
        lengths: {0: "N"},
        OUTPUT_NAMES[0]: {0: "N", 1: "T_out"},
        OUTPUT_NAMES[1]: {0: "N"},
    }
    with exportable_operations(), torch.no_grad(), warnings.catch_warnings():
        # The exporter by tracing is called deprecated, but all of torch 2.6 to 2.13 have it, and it needs no further
        # package. Its other warnings are about shapes that are fixed on purpose.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            example(inputs),
            str(path),
            input_names=[data, lengths],
            output_names=list(OUTPUT_NAMES),
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    written = onnx.load(str(path))
    onnx.helper.set_model_props(written, metadata)
    onnx.save(written, str(path))


def _quantise(source: Path, path: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # The features stay exact.
    nodes = onnx.load(str(source), load_external_data=False).graph.node
    kept = [node.name for node in nodes if node.op_type == "MatMul" and any("fbank" in name for name in node.input)]
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends preprocessing, through the root logger
    try:
        quantize_dynamic(
            str(source),
            str(path),
            op_types_to_quantize=["MatMul"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            nodes_to_exclude=kept,
        )
    finally:
        root.setLevel(level)


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"ONNX files need the packages onnx and onnxruntime ({error}): pip install '.[onnx]'"
        ) from error
