"""The examples, in a few steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.int8 import quantized, rounded
from examples.study import main


def test_rounded_to_255_numbers() -> None:
    x = torch.linspace(-3, 3, 10_001)
    found = rounded(x, torch.tensor(2.0))
    assert found.unique().numel() == 255
    within = x.abs() <= 2
    assert (found - x)[within].abs().max() <= 1.001 * 1 / 127
    assert found.abs().max() == 2.0
    assert torch.equal(rounded(torch.zeros(3), torch.zeros(())), torch.zeros(3))


def test_quantized_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    weights = [parameter.clone() for parameter in model.parameters()]
    calibration, x = torch.randn(20, 4), 3 * torch.randn(5, 4)
    found = quantized(model, calibration)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), weights, strict=True))
    hidden_largest = model[:2](calibration).abs().amax()
    first = rounded(x, calibration.abs().amax()) @ rounded(weights[0], weights[0].abs().amax()).T
    second = rounded(first.relu(), hidden_largest) @ rounded(weights[1], weights[1].abs().amax()).T + weights[2]
    torch.testing.assert_close(found(x), second)
    assert not torch.allclose(found(x), model(x), atol=1e-3)


def test_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    main(["--steps", "1", "--seeds", "3", "--every", "80", "--threads", "1", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    runs = json.loads((tmp_path / "study.json").read_text())["runs"]
    assert [(run["kind"], run["seed"]) for run in runs] == [("n = 0", 3), ("n = 1", 3), ("learned", 3)]
    for run in runs:
        assert all(math.isfinite(value) for name, value in run.items() if name != "kind")
        assert (run["to_nothing"] > 0) == (run["kind"] != "n = 0")
        assert run["loss"] != run["int8_loss"]
    assert runs[0]["loss"] != runs[1]["loss"] != runs[2]["loss"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["n", "=", "0", "3"]
    assert "learned against n = 0, what int8 adds to the loss: " in lines[-1]
    assert lines[-1].endswith("of 1 seeds")
