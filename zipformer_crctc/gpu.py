"""Triton kernels for steps on a GPU: most do what the C kernel of the same name does on a CPU.

At the published batch of 120 s a step is bound by the launches of its many small operations, and at larger ones by
memory; a kernel is one launch, and reads and writes each array once. Triton comes with PyTorch's CUDA builds. Where it
or a C compiler (for what starts the kernels) is absent, and with ZIPA_NATIVE=0, PyTorch's operations do the work.
Arithmetic is float32; arrays are float32, bfloat16 or float16, each its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MODULES = {
    "swoosh": "gpu_activations",
    "swoosh_gradient": "gpu_activations",
    "gate": "gpu_activations",
    "gate_gradient": "gpu_activations",
    "limited": "gpu_activations",
    "bias_norm": "gpu_norms",
    "bias_norm_gradient": "gpu_norms",
    "bypass": "gpu_norms",
    "bypass_gradient": "gpu_norms",
    "moments": "gpu_regularisers",
    "balance": "gpu_regularisers",
    "whiten": "gpu_regularisers",
    "depthwise": "gpu_convolution",
    "depthwise_weight_gradient": "gpu_convolution",
}
"""Where the function of each kernel is; it takes what the C function, if there is one, takes, tensors for addresses."""

MIN_TRITON = (3, 4)
"""That of PyTorch 2.8. All kernels compile with it, and with each version up to 3.6."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_interpreted = False


def takes(x: Any) -> bool:
    """Whether kernels for this array, if any, are those of the GPU."""
    return isinstance(x, Tensor) and (x.is_cuda or _interpreted)


@contextmanager
def interpreted() -> Iterator[None]:
    """Arrays of the CPU go through Triton's interpreter inside, for tests: with TRITON_INTERPRET=1 from the start."""
    global _interpreted
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before


def available() -> bool:
    """Whether kernels run here."""
    return _interpreted or _runs()


@functools.cache
def _runs() -> bool:
    """Tried once, with the smallest kernel."""
    if importlib.util.find_spec("triton") is None:
        logger.info("no GPU kernels, so PyTorch's operations take their place: the package triton is not installed")
        return False
    try:
        version: str = importlib.import_module("triton").__version__
        if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
            logger.info("no GPU kernels, so PyTorch's operations take their place: triton %s is too old", version)
            return False
        x = torch.ones(1, device="cuda")
        y = torch.empty_like(x)
        launch("limited", (x, x, y, 1, 0.0, 2.0))
        return bool(y == x)
    except Exception as error:  # of Triton, a compiler or the driver: there are many kinds
        logger.warning("no GPU kernels, so PyTorch's operations take their place: %s", error)
        return False


def launch(name: str, arguments: tuple[Any, ...]) -> None:
    """Run a kernel on the device of its first argument."""
    with on_device_of(arguments[0]):
        _function(name)(*arguments)


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """What launches Triton kernels inside launches them where x is: by itself Triton takes the current device."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device_of(x) if elsewhere else nullcontext()


@functools.cache
def _function(name: str) -> Callable[..., None]:
    function: Callable[..., None] = getattr(importlib.import_module(f"zipformer_crctc.{MODULES[name]}"), name)
    return function
