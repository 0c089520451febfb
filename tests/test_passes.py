"""The two passes beneath the operators: what an open choice is told, and attention without keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_n.autograd import passes
from attn_n.call import AttentionCall, Options


def tensors() -> dict[str, Tensor]:
    found = {name: torch.randn(2, 2, 4, 8) for name in "qkv"}
    return found | {"n": torch.ones(2), "mask": torch.zeros(1, 1, 4, 4), "slopes": torch.ones(2, 2)}


@pytest.mark.parametrize("differentiated", ["", "q", "k", "v", "n", "mask", "slopes"])
def test_an_open_choice_is_told_what_needs_a_gradient(differentiated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[AttentionCall] = []
    monkeypatch.setattr(passes, "_choose", lambda call: told.append(call))
    x = tensors()
    if differentiated:
        x[differentiated].requires_grad_()
    options = Options(0.3, mask=x["mask"], alibi_slopes=x["slopes"])
    passes.chosen_now(passes.ANY_BACKEND, x["q"], x["k"], x["v"], x["n"], options)
    (call,) = told
    assert call.needs_grad is call.return_lse is bool(differentiated)
    assert call.mask_needs_grad is (differentiated == "mask")
    assert call.alibi_needs_grad is (differentiated == "slopes")


@pytest.mark.parametrize(
    ("n", "kind"),
    [(None, "float"), (torch.ones(2), "per head"), (torch.ones(()), "per head"), (torch.ones(2, 2, 4), "per row")],
)
def test_an_open_choice_is_told_the_kind_of_n(n: Tensor | None, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[AttentionCall] = []
    monkeypatch.setattr(passes, "_choose", lambda call: told.append(call))
    x = tensors()
    passes.chosen_now(passes.ANY_BACKEND, x["q"], x["k"], x["v"], n, Options(0.3))
    assert told[0].n_kind == kind
    assert not told[0].needs_grad


@pytest.mark.parametrize("n_is_logit", [False, True])
@pytest.mark.parametrize("needs", [(False, False, False), (True, False, True), (True, True, False)])
def test_the_backward_without_keys(n_is_logit: bool, needs: tuple[bool, bool, bool]) -> None:
    """lse is log n, whose gradient is that of the lse; all others are zero, and what nobody needs is empty."""
    q, k, v = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 0, 8), torch.randn(2, 2, 0, 6)
    mask, slopes, n = torch.zeros(1, 1, 4, 0), torch.ones(2, 2), torch.tensor([0.5, 2.0])
    options = Options(0.3, mask=mask, alibi_slopes=slopes)
    out, lse, _ = passes.forward(options, True, q, k, v, n, n_is_logit, None, None, "reference")
    assert not out.any()
    assert torch.allclose(lse, (n if n_is_logit else n.log())[:, None].expand(2, 2, 4))
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    arguments = dout, dlse, q, k, v, out, lse, None, n, n_is_logit, True, *needs, None, "reference"
    dq, dk, dv, dn, dmask, dslopes = passes.backward(options, *arguments)
    for gradient, x in ((dq, q), (dk, k), (dv, v)):
        assert gradient.shape == x.shape
        assert not gradient.any()
    of_n = dlse.sum((0, 2)) / (1 if n_is_logit else n)
    assert torch.allclose(dn, of_n) if needs[0] else dn.numel() == 0
    assert dmask.shape == (mask.shape if needs[1] else (0,))
    assert dslopes.shape == (slopes.shape if needs[2] else (0,))
    assert not dslopes.any()
