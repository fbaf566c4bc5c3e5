"""The random generators of a process: seeding, and saving their state, so that a run goes on as it would have.

Besides the generators themselves, the Whiten modules remember from step to step how probable their next check is; both
differ from rank to rank.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from zipformer_crctc.regularisers import Whiten


def seed_everything(seed: int, rank: int) -> None:
    """Seed all generators; Python's own, which takes yes/no decisions, alike on all ranks."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed + 100_003 * rank)


def random_state(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Plain values and tensors that ``set_random_state`` takes.

    Args:
        model: whose Whiten modules are asked for their probabilities.
        device: of the model; its generator is left out where it is the CPU's.
    """
    version, words, next_normal = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    return {
        "python": {"version": version, "words": torch.tensor(words), "next_normal": next_normal},
        "numpy": {
            **numpy_state,
            "state": {
                "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
                "pos": int(numpy_state["state"]["pos"]),
            },
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "whiten": {name: module.prob for name, module in _whitens(model).items()},
    }


def set_random_state(state: Mapping[str, Any], model: nn.Module, device: torch.device) -> None:
    """Go back to a saved state; the model is of the same configuration, the device of the same kind if it is a GPU."""
    python, numpy_state = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["next_normal"]))
    key = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    for name, module in _whitens(model).items():
        module.prob = state["whiten"][name]


def _whitens(model: nn.Module) -> dict[str, Whiten]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Whiten)}
