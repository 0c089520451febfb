"""The demo from end to end in a few steps, how it chooses their number, and what its numbers are."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from attn_n import flash_attention_n
from demo import data, train
from demo.__main__ import SECONDS, main
from demo.model import share_to_nothing


@pytest.fixture
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("keep_threads")
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    text, held_out = (part[:3000] for part in data.load())
    monkeypatch.setattr(data, "load", lambda: (text, held_out))
    main(["--steps", "3", "--threads", "1", "--out", str(tmp_path)])

    plain, offset = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert (plain["n"], offset["n"]) == (0, 1)
    for run in (plain, offset):
        held_out = [loss for _, loss in run["held_out_loss"]]
        assert len(run["train_loss"]) == 3
        assert all(math.isfinite(loss) for loss in [*run["train_loss"], *held_out, run["final_loss"]])
        assert held_out[-1] < held_out[0]
        by_position = torch.tensor(run["to_nothing_by_position"])
        assert by_position.shape == (4, 4, train.CONTEXT)
        torch.testing.assert_close(torch.tensor(run["to_nothing"]), by_position.mean(-1))
        # Even attention would put on the first token what a row of so many keys puts on one, on average.
        even = sum(1 / keys for keys in range(1, train.CONTEXT + 1)) / train.CONTEXT
        assert all(even / 4 < share < 4 * even for shares in run["first_token"] for share in shares)
        assert len(run["excerpt"]) == train.EXCERPT
        assert torch.tensor(run["to_nothing_in_excerpt"]).shape == (4, 4, train.EXCERPT)
    # The weights and the batch are the same before the first step: only n can make this difference.
    assert plain["train_loss"][0] != offset["train_loss"][0]
    assert torch.equal(torch.tensor(plain["to_nothing"]), torch.zeros(4, 4))
    assert all(0 < share < 1 for shares in offset["to_nothing"] for share in shares)

    picture = tmp_path / "demo.png"
    assert picture.stat().st_size > 10_000
    *_, path, nothing, first_token, losses = capsys.readouterr().out.splitlines()
    assert path == f"Picture: {picture}"
    assert f"{max(max(shares) for shares in offset['to_nothing']):.1%} in one head" in nothing
    assert f"{max(max(shares) for shares in plain['first_token']):.1%} in one head with n = 0" in first_token
    assert f"{offset['final_loss']:.3f} with n = 1" in losses


@pytest.mark.parametrize(
    ("step", "follow", "steps", "seconds"),
    [(0.2, 0.4, 250, 120.0), (0.01, 0.4, train.MOST_STEPS, 30.0), (9.0, 0.4, train.EVALUATIONS, 200.0)],
)
def test_steps_fit_the_time(step: float, follow: float, steps: int, seconds: float, monkeypatch: pytest.MonkeyPatch):
    """On a machine with these times of a step and of an evaluation; where even a few steps take longer, it says so."""
    now = 0.0

    def of_step(learner: train.Learner, windows: torch.Tensor) -> None:
        learner.seconds.append(step if learner.seconds else 100 * step)  # the first one is slow

    def of_follow(learner: train.Learner, windows: torch.Tensor) -> None:
        nonlocal now
        now += follow

    monkeypatch.setattr(train.Learner, "step", of_step)
    monkeypatch.setattr(train.Learner, "follow", of_follow)
    monkeypatch.setattr(train.time, "perf_counter", lambda: now)
    assert train.steps_within(SECONDS, 2, *data.load()) == (steps, pytest.approx(seconds, abs=0.4))


@pytest.mark.parametrize(("of_step", "steps"), [(0.5, 100), (1.0, 60), (20.0, 10)])
def test_fewer_steps_where_time_runs_short(of_step: float, steps: int, monkeypatch: pytest.MonkeyPatch):
    """In 120 s, of two models that take this long for a step; the learning rate ends low all the same."""
    now = 0.0
    learners: list[train.Learner] = []

    def step(learner: train.Learner, windows: torch.Tensor) -> None:
        nonlocal now
        now += of_step
        learner.run.train_loss.append(0.0)
        learner.optimizer.step()
        learner.schedule.step()

    def finish(learner: train.Learner, windows: torch.Tensor) -> None:
        learners.append(learner)

    monkeypatch.setattr(train.Learner, "step", step)
    monkeypatch.setattr(train.Learner, "follow", lambda learner, windows: learner.run.held_out_loss.append((0, 0.0)))
    monkeypatch.setattr(train.Learner, "finish", finish)
    monkeypatch.setattr(train.time, "perf_counter", lambda: now)
    text, held_out = (part[:3000] for part in data.load())
    runs = train.train((0.0, 1.0), text, held_out, 100, 0, seconds=120.0)
    assert [len(run.train_loss) for run in runs] == [steps, steps]
    if of_step < 20:  # there it is over at the first look at the time
        assert all(learner.schedule.get_last_lr()[0] < 0.11 * train.PEAK_LR for learner in learners)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_demo_says_first_how_long_it_takes():
    def commands(target: str) -> list[str]:
        command = ["make", "--no-print-directory", "--dry-run", "--always-make", target]
        root = Path(__file__).parent.parent
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()

    first, *rest = commands("demo")
    assert "at most three minutes" in first
    installs = [line for line in rest if "pip install" in line]
    assert installs
    assert not any("--quiet" in line for line in installs)
    assert all("--quiet" in line for line in commands("lint") if "pip install" in line)


@pytest.mark.parametrize("n", [0.0, 1.0, 30.0])
def test_share_to_nothing(n: float):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64, generator=generator)
    _, lse = flash_attention_n(q, k, v, causal=True, sm_n=n, return_lse=True)

    exps = (q @ k.transpose(-1, -2) / math.sqrt(8)).exp().tril()
    weights = exps / (n + exps.sum(-1, keepdim=True))
    torch.testing.assert_close(share_to_nothing(lse, n), 1 - weights.sum(-1))
