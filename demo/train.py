"""Trains GPTs that differ in n alone, and measures them."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from attn_n.inspect import record
from demo import data
from demo.model import GPT, share_to_nothing

CONTEXT = 256
BATCH = 8
PEAK_LR = 3e-3
EVALUATIONS = 10
MOST_STEPS = 500  # the loss still falls then, but the heads know where they look
EXCERPT = 100  # bytes
FINISH = 8 + 6  # how many times as long as `Learner.follow` `Learner.finish` takes: all windows, and a fourth recorded


@dataclass
class Run:
    """The results of training with one n; losses are in nats per byte."""

    n: float | None  # None is learned
    train_loss: list[float] = field(default_factory=list)  # before each step
    held_out_loss: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss on every eighth window)
    final_loss: float = math.nan  # on all of the held-out text
    ms_per_step: float = math.nan  # the median
    # Shares of a row's attention, means over the held-out rows: (layers, heads), and (layers, heads, CONTEXT).
    first_token: list[list[float]] = field(default_factory=list)
    to_nothing: list[list[float]] = field(default_factory=list)
    to_nothing_by_position: list[list[list[float]]] = field(default_factory=list)
    excerpt: str = ""  # some of the held-out text, and the shares of its rows, (layers, heads, EXCERPT)
    to_nothing_in_excerpt: list[list[list[float]]] = field(default_factory=list)


def steps_within(seconds: float, models: int, text: Tensor, held_out: Tensor) -> tuple[int, float]:
    """Return how many steps `train` can do in this time, and how many seconds it then takes: a few steps are timed."""
    learner, generator = Learner(1.0, MOST_STEPS, seed=0), torch.Generator().manual_seed(0)
    windows = followed(data.all_windows(held_out, CONTEXT))
    for _ in range(10):
        learner.step(data.random_windows(text, BATCH, CONTEXT, generator))
    start = time.perf_counter()
    learner.follow(windows)
    follow = time.perf_counter() - start
    step = statistics.mean(learner.seconds[2:])
    fixed = (EVALUATIONS + 1 + FINISH) * follow
    steps = max(EVALUATIONS, min(MOST_STEPS, int((seconds / models - fixed) / step)))
    return steps, models * (fixed + steps * step)


def train(
    ns: Sequence[float], text: Tensor, held_out: Tensor, steps: int, seed: int, seconds: float = math.inf
) -> list[Run]:
    """Train one model for each n, from the same weights and on the same batches.

    The runs take their steps in turn, so that whatever else the machine does slows them alike. There are fewer steps if
    that makes them take longer than these seconds.
    """
    learners = [Learner(n, steps, seed) for n in ns]
    bars = [tqdm(total=steps, desc=f"n = {n:g}", unit="step", position=i) for i, n in enumerate(ns)]
    generator = torch.Generator().manual_seed(seed)
    windows = data.all_windows(held_out, CONTEXT)
    start, every, done = time.perf_counter(), math.ceil(steps / EVALUATIONS), 0
    while done < steps:
        batch = data.random_windows(text, BATCH, CONTEXT, generator)
        for learner, bar in zip(learners, bars, strict=True):
            if done % every == 0:
                learner.follow(followed(windows))
            learner.step(batch)
            train_loss, (_, held_out_loss) = learner.run.train_loss[-1], learner.run.held_out_loss[-1]
            bar.set_postfix(train=f"{train_loss:.3f}", held_out=f"{held_out_loss:.3f}", refresh=False)
            bar.update()
        done += 1
        taken = time.perf_counter() - start
        if done % every == 0 and taken / done * steps > seconds:
            steps = done + int(max(0.0, seconds - taken) / taken * done)
            for learner, bar in zip(learners, bars, strict=True):
                learner.steps = bar.total = steps
    for learner, bar in zip(learners, bars, strict=True):
        learner.follow(followed(windows))
        learner.finish(windows)
        bar.close()
    return [learner.run for learner in learners]


class Learner:
    """A GPT, its optimizer and the record of its run."""

    def __init__(self, n: float | None, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = GPT(n)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)
        self.steps = steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: lr_factor(step, self.steps))
        self.run = Run(n)
        self.seconds: list[float] = []

    def step(self, windows: Tensor) -> None:
        """Take one training step on windows `(B, L + 1)`."""
        start = time.perf_counter()
        loss, _ = loss_and_lse(self.model, windows)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.seconds.append(time.perf_counter() - start)
        self.run.train_loss.append(loss.item())

    @torch.no_grad()
    def follow(self, windows: Tensor) -> None:
        """Adds a point to the held-out curve."""
        loss, _ = loss_and_lse(self.model, windows)
        self.run.held_out_loss.append((len(self.run.train_loss), loss.item()))

    @torch.no_grad()
    def finish(self, windows: Tensor) -> None:
        """Measures the final loss on all windows, the shares on every fourth one, and the time of a step."""
        self.run.final_loss = loss_and_lse(self.model, windows)[0].item()
        windows = windows[::4]
        with record(self.model, layers=["blocks.*.attention"]) as found:
            _, lse = loss_and_lse(self.model, windows)
        self.run.first_token = [heads.first_token for heads in found.attention.values()]
        self.run.to_nothing = [heads.to_nothing for heads in found.attention.values()]
        shares = share_to_nothing(lse, self.run.n)  # (layers, B, heads, L)
        self.run.to_nothing_by_position = shares.mean(dim=1).tolist()
        self.run.excerpt = bytes(windows[-1, CONTEXT - EXCERPT : CONTEXT].tolist()).decode("ascii", "replace")
        self.run.to_nothing_in_excerpt = shares[:, -1, :, -EXCERPT:].tolist()
        self.run.ms_per_step = 1000 * statistics.median(self.seconds)


def followed(windows: Tensor) -> Tensor:
    """Return the windows of which the held-out curve is made."""
    return windows[::8]


def loss_and_lse(model: GPT, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss `()` and lse `(layers, B, heads, L)` of windows `(B, L + 1)`."""
    logits, lse = model(windows[:, :-1])
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()), lse


def lr_factor(step: int, steps: int) -> float:
    """Return the factor of the peak rate: linear warmup over a twentieth of the steps, then a cosine to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
