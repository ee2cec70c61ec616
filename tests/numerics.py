"""The error budget of every numerical test: at most twice the error of plain torch in the same dtype, against fp64."""

import torch
from torch import Tensor


def assert_as_accurate(name: str, out: Tensor, same: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """Fail unless out's largest error against the fp64 ``exact`` is at most ``factor`` times that of ``same`` (plain
    torch in out's own dtype) plus one rounding of the largest value."""
    assert out.shape == exact.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(exact.shape)}"
    if out.numel() == 0:
        return
    assert torch.isfinite(out).all(), f"{name}: non-finite values"
    floor = torch.finfo(out.dtype).eps * exact.abs().max().item()
    error = (out.double() - exact).abs().max().item()
    budget = factor * (same.double() - exact).abs().max().item() + floor
    assert error <= budget, f"{name}: error {error:.3e} > budget {budget:.3e}"
