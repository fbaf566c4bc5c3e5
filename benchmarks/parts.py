"""The time of a step by part of the model, through hooks on its modules; each part without the parts inside it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

PARTS = {
    "front-end": ("Conv2dSubsampling",),
    "attention weights": ("AttentionWeights", "RelPositionMultiheadAttentionWeights"),
    "attention": ("SelfAttention", "NonlinAttention"),
    "convolution": ("ConvModule", "ConvolutionModule"),
    "feed-forward": ("FeedForward", "FeedforwardModule"),
    "Balancer and Whiten": ("Balancer", "Whiten"),
    "BiasNorm and Bypass": ("BiasNorm", "Bypass", "BypassModule"),
    "rest of the encoder": ("Zipformer",),
}
"""By class name, ours and the peer's."""
OUTSIDE = "loss and the rest"


class Stopwatch:
    """Gives the time since the last event to the part that was entered last and not left."""

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.inside: list[str] = []
        self.last = 0.0

    def tick(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.inside[-1] if self.inside else OUTSIDE] += now - self.last
        self.last = now

    def enter(self, part: str) -> Callable[..., None]:
        """A hook."""

        def hook(*_: Any) -> None:
            self.tick()
            self.inside.append(part)

        return hook

    def leave(self, part: str) -> Callable[..., None]:
        """A hook."""

        def hook(*_: Any) -> None:
            self.tick()
            if part in self.inside:
                del self.inside[len(self.inside) - 1 - self.inside[::-1].index(part)]

        return hook


def seconds_by_part(model: nn.Module, step: Callable[[], Any], device: str) -> dict[str, float]:
    """Seconds of one step, forward and backward together; the hooks stay, so the process is of no other use then."""
    watch = Stopwatch(device)
    by_class = {name: part for part, names in PARTS.items() for name in names}
    for module in model.modules():
        part = by_class.get(type(module).__name__)
        if part is None:
            continue
        if part == "front-end":  # else its backward hooks would not see its end
            module.register_forward_pre_hook(lambda _, inputs: (_with_gradient(inputs[0]), *inputs[1:]))
        module.register_forward_pre_hook(watch.enter(part))
        module.register_forward_hook(watch.leave(part))
        if torch.is_grad_enabled() and model.training:
            module.register_full_backward_pre_hook(watch.enter(part))
            module.register_full_backward_hook(watch.leave(part))
    register_optimizer_step_pre_hook(watch.enter("optimizer"))
    register_optimizer_step_post_hook(watch.leave("optimizer"))
    watch.last = time.perf_counter()
    step()
    watch.inside.clear()
    watch.tick()
    return dict(watch.seconds)


def _with_gradient(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_() if torch.is_grad_enabled() else x
