"""The demo from end to end in a few steps, and the formula behind its heat map."""

import json
import math
from pathlib import Path

import pytest
import torch

from attn_n import flash_attention_n
from demo.__main__ import main
from demo.model import share_to_nothing


@pytest.fixture
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("keep_threads")
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--steps", "3", "--threads", "1", "--out", str(tmp_path)])

    plain, offset = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert (plain["n"], offset["n"]) == (0, 1)
    for run in (plain, offset):
        held_out = [loss for _, loss in run["held_out_loss"]]
        assert len(run["train_loss"]) == 3
        assert all(math.isfinite(loss) for loss in [*run["train_loss"], *held_out, run["final_loss"]])
        assert held_out[-1] < held_out[0]
    # The weights and the batch are the same before the first step: only n can make this difference.
    assert plain["train_loss"][0] != offset["train_loss"][0]
    assert torch.equal(torch.tensor(plain["share_to_nothing"]), torch.zeros(4, 4))
    assert all(0 < share < 1 for shares in offset["share_to_nothing"] for share in shares)
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert f"{offset['final_loss']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("n", [0.0, 1.0, 30.0])
def test_share_to_nothing(n: float):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64, generator=generator)
    _, lse = flash_attention_n(q, k, v, causal=True, sm_n=n, return_lse=True)

    exps = (q @ k.transpose(-1, -2) / math.sqrt(8)).exp().tril()
    weights = exps / (n + exps.sum(-1, keepdim=True))
    torch.testing.assert_close(share_to_nothing(lse, n), 1 - weights.sum(-1))
