"""Kernels for steps: in C on a CPU, in Triton on a GPU (gpu.py); they are never needed.

A kernel reads and writes its arrays once, where PyTorch does so for each operation of a chain of element-wise ones.
The C sources are in csrc, built with the machine's own compiler at first use, for float32. For anything else, without a
compiler, or with the environment variable ZIPA_NATIVE=0, the caller of a kernel does the same by PyTorch's operations.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from zipformer_crctc import gpu
from zipformer_crctc.usercache import user_cache

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).resolve().parent / "csrc"
FLAGS = ("-O3", "-march=native", "-fPIC", "-std=gnu11", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
BUILD_SECONDS = 120
"""A compiler that takes longer is given up."""
KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
"""Types of arguments by letter: an array (or none), a number of things, a value."""

_DTYPES = (torch.float32,)

_lock = threading.Lock()
_enabled = os.environ.get("ZIPA_NATIVE", "1") != "0"


class Kernel:
    """A function of the C sources, or of the same name in Triton, by where its arrays are.

    Args:
        name: its name there.
        arguments: a letter of KINDS for each argument.
    """

    def __init__(self, name: str, arguments: str) -> None:
        self.name = name
        self.arguments = arguments
        self._function: Callable[..., None] | None = None

    def __call__(self, *arguments: Tensor | float | None) -> None:
        """Run it. Arrays are tensors, which the caller has found fit by `suits`; the first argument is one."""
        if gpu.takes(arguments[0]):
            gpu.launch(self.name, arguments)
            return
        if self._function is None:
            library = _library()
            assert library is not None, "a kernel is called only where `suits` says so"
            function = getattr(library, self.name)
            function.argtypes = [KINDS[letter] for letter in self.arguments]
            function.restype = None
            self._function = function
        self._function(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])


def suits(*arrays: Tensor | None) -> bool:
    """Whether kernels are there and take these arrays: all on one device, values of the last axis side by side.

    On a CPU they are float32; on a GPU see gpu.py.
    """
    on_gpu: bool | None = None
    for x in arrays:
        if x is None:
            continue
        if on_gpu is None:
            on_gpu = gpu.takes(x)
        if (
            not (gpu.takes(x) if on_gpu else x.is_cpu)
            or x.dtype not in (gpu.DTYPES if on_gpu else _DTYPES)
            or (on_gpu and x.numel() == 0)
        ):
            return False
        if not (x.is_contiguous() or x.stride(-1) == 1):
            return False
    # What is exported runs elsewhere.
    if not _enabled or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return gpu.available() if on_gpu else not torch.is_autocast_enabled("cpu") and _library() is not None


@contextmanager
def disabled() -> Iterator[None]:
    """Without kernels inside."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def use_on_all_or_none(there: Sequence[bool]) -> None:
    """Of processes that train together: results differ by rounding, so that ranks would drift apart."""
    global _enabled
    if not all(there):
        if any(there):
            logger.warning(
                "kernels are not there for %d of %d processes: none uses them", there.count(False), len(there)
            )
        _enabled = False


def _library() -> ctypes.CDLL | None:
    """The kernels, built if need be; None where that cannot be done."""
    with _lock:
        return _loaded()


@functools.cache
def _loaded() -> ctypes.CDLL | None:
    try:
        path = _built()
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged
            path.unlink()
            return ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        logger.info("no C kernels, so PyTorch's operations take their place: %s", error)
        return None


def _built() -> Path:
    """The shared library for this machine and these sources, from the user's cache or made now."""
    if sys.platform != "linux":
        raise OSError(f"not built on {sys.platform}")
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler: install gcc for faster training on a CPU")
    sources, openmp = sorted(SOURCES.glob("*.c")), _openmp()
    headers = sorted(SOURCES.glob("*.h"))
    what = [compiler, *FLAGS, openmp, _processor(), *(path.read_text(encoding="utf-8") for path in sources + headers)]
    name = hashlib.sha256("\0".join(what).encode()).hexdigest()[:16]
    path = user_cache("kernels") / f"{name}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / path.name
            # PyTorch's own threads: a second OpenMP library would have threads of its own, and each set waits for work.
            command = [compiler, *FLAGS, "-shared", "-o", str(whole), *map(str, sources), openmp, "-lm"]
            made = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS)
            if made.returncode:
                raise OSError(f"{compiler} failed: {made.stderr.strip()[-500:]}")
            with whole.open("rb") as file:
                os.fsync(file.fileno())  # half a library would kill the programs that load it
            whole.replace(path)
    return path


def _openmp() -> str:
    """The OpenMP library that PyTorch has loaded."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    loaded = {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line or "libiomp5" in line}
    if not loaded:
        raise OSError("PyTorch does not use OpenMP here")
    return sorted(loaded)[0]


def _processor() -> str:
    """What -march=native depends on: home folders are shared by machines of several kinds."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    of_kind = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    kept = [line for line in lines if line.startswith(of_kind)]
    return "\n".join([platform.machine(), *kept])
