"""16-bit copies of parameters, and linear layers under autocast that use them."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpu_device import DEVICE, kernels
from zipformer_crctc import lowprecision
from zipformer_crctc.products import Linear

LOW = torch.bfloat16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 3))


def test_a_copy_follows_its_parameter() -> None:
    p = weight()
    first = lowprecision.copy_of(p, LOW)
    assert torch.equal(first, p.to(LOW)) and not first.requires_grad
    assert lowprecision.copy_of(p, LOW) is first
    with torch.no_grad():
        p.add_(1.0)
    assert torch.equal(lowprecision.copy_of(p, LOW), p.to(LOW))
    with torch.inference_mode():
        p.data.mul_(2.0)
    lowprecision.new_pass(nn.ParameterList([p]))  # nothing else tells of .data
    assert torch.equal(lowprecision.copy_of(p, LOW), p.to(LOW))
    p.data = torch.randn(5, 2)
    assert torch.equal(lowprecision.copy_of(p, LOW), p.to(LOW))


def test_a_pass_leaves_the_copies_of_other_models_alone() -> None:
    ours, theirs = nn.ParameterList([weight(), weight()]), nn.ParameterList([weight()])
    copies = [lowprecision.copy_of(p, LOW) for p in (*ours, *theirs)]
    with torch.no_grad():
        for p in (*ours, *theirs):
            p.add_(1.0)
    lowprecision.new_pass(ours)
    lowprecision.copy_of(ours[0], LOW)
    fresh = [torch.equal(copy, p.to(LOW)) for copy, p in zip(copies, (*ours, *theirs), strict=True)]
    assert fresh == [True, True, False]


def test_copies_go_with_their_parameters() -> None:
    p = weight()
    lowprecision.copy_of(p, LOW)
    before = len(lowprecision._copies[LOW])
    del p
    gc.collect()
    assert len(lowprecision._copies[LOW]) == before - 1


def test_a_cast_is_shared_while_it_is_there() -> None:
    x = torch.randn(3)
    first = lowprecision.cast(x, LOW)
    assert lowprecision.cast(x, LOW) is first
    x.add_(1.0)
    second = lowprecision.cast(x, LOW)
    assert second is not first and torch.equal(second, x.to(LOW))
    with torch.inference_mode():
        assert lowprecision.cast(x, LOW).is_inference()
    assert not lowprecision.cast(x, LOW).is_inference()


def test_a_copy_that_was_made_elsewhere_is_kept_as_long_as_what_it_is_of() -> None:
    for context in (torch.inference_mode(), torch.inference_mode(False)):
        with context:
            x, y = torch.randn(2, 3).unbind()
            lowprecision.remember(x, copy := x.to(LOW))
            place = copy.data_ptr()
            del copy
            assert lowprecision.cast(x, LOW).data_ptr() == place
            assert torch.equal(lowprecision.cast(y, LOW), y.to(LOW))
            assert torch.equal(lowprecision.cast(x, torch.float16), x.to(torch.float16))
            lowprecision.remember(x, x.to(LOW))
            del x
            assert lowprecision._of_thread.casts.newest is None


@pytest.mark.parametrize("shape", [(5, 2, 8), (0, 2, 8), (8,)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_under_autocast(shape: tuple[int, ...], bias: bool) -> None:
    """Rounded to 16 bits are its inputs and its output; gradients come in the types of what they belong to."""
    layer = Linear(8, 6, bias=bias).to(DEVICE)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)

    def results(compute: object) -> list[Tensor]:
        y = compute(x)  # type: ignore[operator]
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]

    with kernels(), torch.autocast(DEVICE, LOW):
        found = results(layer)
    rounded = [p.detach().to(LOW).float() for p in layer.parameters()]
    with torch.no_grad():
        want = F.linear(x.to(LOW).float(), *rounded)
    assert found[0].dtype == LOW and all(grad.dtype == torch.float32 for grad in found[1:])
    assert torch.allclose(found[0].float(), want, rtol=1e-2, atol=1e-2)
    for got, plain in zip(found[1:], results(layer)[1:], strict=True):
        assert got.shape == plain.shape
        assert torch.allclose(got, plain, rtol=0.05, atol=0.05 * float(plain.abs().max()) if plain.numel() else 0.0)
