"""One way through: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "zipformer_crctc"
MODULES = sorted(path.stem for path in (ROOT / PACKAGE).glob("*.py") if path.stem != "__init__")
PROGRAMS = {
    *("train", "decode", "report", "align", "time_errors", "pseudo_label", "tune_search", "transcribe", "cli"),
    *("export_onnx", "save_pretrained", "demo"),
}

MODEL = [
    "schedule",
    "usercache",
    "autograd",
    "gpu",
    "native",
    "lowprecision",
    "gpu_tiles",
    "gpu_activations",
    "gpu_images",
    "gpu_sequences",
    "products",
    "gpu_norms",
    "gpu_depthwise_images",
    "gpu_convolution",
    "gpu_regularisers",
    "convolution",
    "regularisers",
    "activations",
    "norms",
    "frontend",
    "attention_shared",
    "gpu_attention",
    "attention",
    "layers",
    "encoder",
    "model",
    "losses",
]
"""The model in the order of its parts: each imports only what stands before it."""
SETTINGS = {"config", "flags"}
"""What the model may know besides itself."""


def imports(module: str) -> set[str]:
    """Modules of the package that a module imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}.py, line {node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        parts = [name.split(".") for name in names]
        found |= {part[1] for part in parts if part[0] == PACKAGE and len(part) > 1}
    return found & set(MODULES)


def test_nothing_imports_the_programs() -> None:
    assert "train" in MODULES
    users = {module: sorted(imports(module) & PROGRAMS) for module in MODULES}
    assert {module: used for module, used in users.items() if used} == {}


def test_there_are_no_circles() -> None:
    order = list(TopologicalSorter({module: imports(module) for module in MODULES}).static_order())
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("module", MODEL)
def test_the_model_is_built_from_the_bottom_up(module: str) -> None:
    assert imports(module) <= set(MODEL[: MODEL.index(module)]) | SETTINGS


def test_the_objective_is_above_the_model_and_the_data() -> None:
    """Batches become losses in one place; neither side knows of it, nor of the optimizer."""
    above = {"objective", "optim", "checkpoint", "search", "ngram", "inventory", "methods"}
    above |= {"beam", "beamblock", "blockrunner", "k2_search"}
    above |= {"metrics", "results", *PROGRAMS}
    for module in ("features", "shar", "batches", "loader", "filters", "augment", "tokenizer", "text", *MODEL):
        assert imports(module) & above == set(), module


def test_optional_packages_stay_out_of_the_model() -> None:
    """The model is used without the packages that data, logging and scoring need."""
    unwanted = [
        "lhotse",
        "tensorboard",
        "panphon",
        "wandb",
        "sentencepiece",
        "soundfile",
        "k2",
        "onnxruntime",
        "transformers",
        "triton",
    ]
    code = f"import sys, {PACKAGE}.model; print([name for name in {unwanted!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_inference_needs_only_the_packages_of_a_plain_installation() -> None:
    """What `pip install` without extras brings: torch, numpy, soundfile, soxr, sentencepiece, tqdm."""
    unwanted = ["lhotse", "yaml", "panphon", "tensorboard", "wandb", "safetensors", "huggingface_hub", "k2", "gradio"]
    imported = f"import sys, {PACKAGE}.cli, {PACKAGE}.transcribe, {PACKAGE}.align"
    code = f"{imported}; print([name for name in {unwanted!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
