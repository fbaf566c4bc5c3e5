"""Random generators go on where they were."""

from __future__ import annotations

import io
import random

import numpy as np
import torch

from small_models import small_model
from zipformer_crctc.randomstate import random_state, seed_everything, set_random_state
from zipformer_crctc.regularisers import Whiten

CPU = torch.device("cpu")


def draws() -> list[float]:
    normal = random.gauss(0.0, 1.0)  # keeps a second number for the next call
    return [normal, random.random(), float(np.random.standard_normal()), *torch.randn(3).tolist()]


def test_all_generators_go_on_after_a_state_was_saved_and_read() -> None:
    model = small_model()
    seed_everything(5, rank=1)
    draws()
    file = io.BytesIO()
    torch.save(random_state(model, CPU), file)
    expected = [draws(), draws()]
    seed_everything(6, rank=0)
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True), model, CPU)
    assert [draws(), draws()] == expected


def test_whiten_modules_keep_their_probabilities() -> None:
    model, other = small_model(), small_model(seed=1)
    whitens = [module for module in model.modules() if isinstance(module, Whiten)]
    whitens[1].prob = Whiten.min_prob
    set_random_state(random_state(model, CPU), other, CPU)
    probs = [module.prob for module in other.modules() if isinstance(module, Whiten)]
    assert probs == [module.prob for module in whitens]
    assert probs[:2] == [Whiten.max_prob, Whiten.min_prob]


def test_ranks_share_decisions_and_differ_in_noise() -> None:
    seed_everything(3, rank=0)
    first = draws()
    seed_everything(3, rank=1)
    second = draws()
    assert first[:3] == second[:3]
    assert first[3:] != second[3:]
