"""The convolutional front-end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from small_models import draw_parameters
from zipformer_crctc import frontend
from zipformer_crctc.activations import swoosh_l, swoosh_r
from zipformer_crctc.frontend import Conv2dSubsampling, ConvNeXt, output_frames, scale_initial_values
from zipformer_crctc.regularisers import Balancer, Whiten


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def small_frontend(seed: int = 0) -> Conv2dSubsampling:
    return draw_parameters(Conv2dSubsampling(80, 12, (3, 4, 6), 10), 0.3, seed).eval()


def test_number_of_output_frames() -> None:
    assert output_frames(torch.tensor([9, 10, 11, 100, 137])).tolist() == [1, 1, 2, 46, 65]


@pytest.mark.parametrize("frames", [9, 10, 11, 40, 57])
def test_shapes(frames: int) -> None:
    y, lengths = small_frontend()(torch.randn(2, frames, 80), torch.tensor([frames, 9]))
    assert y.shape == (2, (frames - 7) // 2, 12)
    assert lengths.tolist() == [(frames - 7) // 2, 1]


def test_hidden_images_are_cut_between_utterances(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.zeros(5, 6, 4, 3)
    monkeypatch.setitem(frontend.HIDDEN_BYTES, "cpu", 2 * 4 * 3 * 10 * 4)
    assert [len(part) for part in frontend.in_parts(image, 10)] == [2, 2, 1]
    assert [len(part) for part in frontend.in_parts(image, 11)] == [1] * 5
    assert [len(part) for part in frontend.in_parts(image, 1000)] == [1] * 5


def test_parts_of_the_hidden_image_give_what_the_whole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the Balancer of the hidden channels at work."""
    block = draw_parameters(ConvNeXt(6, 10), 0.3).train()
    for name, module in block.named_modules():
        if isinstance(module, (Balancer, Whiten)):
            module.prob = float(name == "hidden_balancer")
    x = torch.randn(5, 6, 4, 3, requires_grad=True)
    cotangent = torch.randn(5, 6, 4, 3)

    def results(limit: int) -> list[Tensor]:
        monkeypatch.setitem(frontend.HIDDEN_BYTES, "cpu", limit)
        torch.manual_seed(0)
        y = block(x)
        return [y, *torch.autograd.grad(y, [x, *block.parameters()], cotangent)]

    for part, whole in zip(results(1), results(1 << 30), strict=True):
        assert torch.allclose(part, whole, rtol=1e-5, atol=1e-5)


def test_published_widths_are_the_default() -> None:
    shapes = {name: tuple(p.shape) for name, p in Conv2dSubsampling(80, 192).named_parameters()}
    assert shapes["conv.0.weight"] == (8, 1, 3, 3)
    assert shapes["conv.4.weight"] == (32, 8, 3, 3)
    assert shapes["conv.7.weight"] == (128, 32, 3, 3)
    assert shapes["convnext.depthwise_conv.weight"] == (128, 1, 7, 7)
    assert shapes["convnext.pointwise_conv1.weight"] == (384, 128, 1, 1)
    assert shapes["out.weight"] == (192, 2432)


def test_front_end_is_its_table() -> None:
    """Step by step with plain contiguous tensors, which holds the order of the flattened channels as well."""
    model = small_frontend()
    p = dict(model.named_parameters())
    x = torch.randn(2, 31, 80)
    y = F.conv2d(x[:, None], p["conv.0.weight"].contiguous(), p["conv.0.bias"], padding=(0, 1))
    y = F.conv2d(swoosh_r(y), p["conv.4.weight"].contiguous(), p["conv.4.bias"], stride=2)
    y = swoosh_r(F.conv2d(swoosh_r(y), p["conv.7.weight"].contiguous(), p["conv.7.bias"], stride=(1, 2)))
    hidden = F.conv2d(y, p["convnext.depthwise_conv.weight"], p["convnext.depthwise_conv.bias"], padding=3, groups=6)
    hidden = F.conv2d(hidden, p["convnext.pointwise_conv1.weight"], p["convnext.pointwise_conv1.bias"])
    y = y + F.conv2d(swoosh_l(hidden), p["convnext.pointwise_conv2.weight"], p["convnext.pointwise_conv2.bias"])
    y = y.transpose(1, 2).flatten(2)  # (N, T', C * F'), index c * F' + f
    y = F.linear(y, p["out.weight"], p["out.bias"])
    rms = (y - p["out_norm.bias"]).square().mean(-1, keepdim=True).sqrt()
    want = y * p["out_norm.log_scale"].exp() / rms
    got, _ = model(x, torch.tensor([31, 31]))
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


def test_output_frame_sees_its_part_of_the_input() -> None:
    """Frame t sees the input frames 2t - 6 ... 2t + 14, so padding reaches the last three frames of an utterance."""
    x = torch.randn(1, 61, 80, requires_grad=True)
    y, lengths = small_frontend()(x, torch.tensor([61]))
    for t in (0, 2, 10, int(lengths) - 1):
        (gradient,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        seen = gradient[0].abs().sum(-1).nonzero().flatten()
        assert seen.min() == max(0, 2 * t - 6)
        assert seen.max() == min(60, 2 * t + 14)


@pytest.mark.parametrize(("frames", "num_frames"), [(40, [40, 8]), (30, [40, 30])])
def test_lengths_must_fit(frames: int, num_frames: list[int]) -> None:
    with pytest.raises(ValueError, match=r"none may be longer.*at least 9"):
        small_frontend()(torch.randn(2, frames, 80), torch.tensor(num_frames))


def test_gradient_of_the_first_convolution_is_scaled_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.random", lambda: 0.999)  # no Balancer, Whiten or limiter
    model, x = small_frontend(), torch.randn(2, 20, 80)
    model.convnext.layerdrop_rate.values = [0.0, 0.0]

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(x, torch.tensor([20, 20]))[0].square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    in_evaluation = gradients()
    model.train()
    in_training = gradients()
    for name, gradient in in_training.items():
        factor = 0.2 if name.startswith("conv.0.") else 1.0
        assert torch.allclose(gradient, factor * in_evaluation[name], rtol=1e-3, atol=1e-5), name


def test_conv_next_is_residual() -> None:
    block = draw_parameters(ConvNeXt(4, 9)).eval()
    x = torch.randn(2, 4, 6, 5)
    with torch.no_grad():
        block.pointwise_conv2.weight.zero_()
        block.pointwise_conv2.bias.fill_(0.25)  # type: ignore[union-attr]
        assert torch.allclose(block(x), x + 0.25)


def test_initial_values() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(400, 300)
    torch.manual_seed(0)
    plain = torch.nn.Linear(400, 300)
    scale_initial_values(layer, 0.05)
    assert torch.allclose(layer.weight, 0.05 * plain.weight)
    assert 0.0045 < layer.bias.abs().max() <= 0.005
    assert layer.bias.std().item() == pytest.approx(0.005 / 3**0.5, rel=0.1)
    block = ConvNeXt(128, 384)
    bound = 0.01 / 384**0.5
    assert 0.95 * bound < block.pointwise_conv2.weight.abs().max() <= bound
    assert block.pointwise_conv2.bias is not None
    assert 0.0009 < block.pointwise_conv2.bias.abs().max() <= 0.001
