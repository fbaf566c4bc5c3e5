"""Linear layers through oneDNN against plain ones."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional as F

from zipformer_crctc import products
from zipformer_crctc.products import Linear, linear, over_rows

needs_onednn = pytest.mark.skipif(not products.HAS_ONEDNN, reason="oneDNN or AVX-512 is not there")


@pytest.fixture(autouse=True)
def _for_small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "MIN_SIZE", 64 * 30)


@pytest.mark.parametrize("shape", [(64, 30), (33, 4, 30), (7, 30), (9000, 30)])
@pytest.mark.parametrize("out", [20, 50])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_a_plain_linear_layer(shape: tuple[int, ...], out: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(30, out, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], out)
    found = torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)
    plain = [x, *layer.parameters()]
    exact = [value.detach().double().requires_grad_() for value in plain]
    want = torch.autograd.grad(F.linear(*exact), exact, grad.double())
    for a, b in zip(found, want, strict=True):
        assert a.is_contiguous()
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4)
    assert torch.allclose(layer(x).double(), F.linear(*exact), rtol=1e-5, atol=1e-5)


def test_inputs_that_are_not_contiguous() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(30, 5, 100).permute(2, 1, 0), torch.randn(20, 60)[:, ::2]
    assert torch.allclose(linear(x, weight), F.linear(x, weight), atol=1e-5)
    a, b = torch.randn(2, 500, 40).unbind()
    assert torch.allclose(over_rows(a[:, :10], b[:, 5:]), a[:, :10].t() @ b[:, 5:], atol=1e-4)
    assert torch.allclose(over_rows(b, a[:, :7]), b.t() @ a[:, :7], atol=1e-4)


def test_other_types_are_left_to_pytorch() -> None:
    x, weight = torch.randn(100, 30, dtype=torch.float64), torch.randn(20, 30, dtype=torch.float64)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), weight.float()).dtype == torch.bfloat16


@needs_onednn
def test_numbers_of_rows_are_few() -> None:
    lengths = {len(products._to_grid(torch.zeros(rows, 1))) for rows in range(1, 8193)}
    assert len(lengths) < 200
    assert all(len(products._to_grid(torch.zeros(rows, 1))) <= rows * 17 / 16 + 1 for rows in range(1, 8193, 37))
    assert len(products._to_grid(torch.zeros(8193, 1))) == 8193


@needs_onednn
def test_exported_programs_have_plain_products() -> None:
    """And no decision by a size, which may be another where they run."""
    layer = Linear(30, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(layer, torch.randn(100, 30))
    assert "linear" in str(traced.inlined_graph) and "PythonOp" not in str(traced.inlined_graph)
