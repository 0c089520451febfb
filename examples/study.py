"""Does n help int8? Trains the demo's GPT with n = 0, n = 1 and learned sinks, several seeds each, and quantizes it.

Weights and activations of every linear layer become int8 with one scale for each tensor, which outliers make coarse.
Each run prints a line when it is done: the held-out loss before and after, the outliers of the residual stream, and
where the attention goes. At the end stand the means, and what n changes from seed to seed.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from attn_n.inspect import record
from demo import data
from demo.model import GPT
from demo.train import BATCH, CONTEXT, Learner, loss_and_lse
from examples.int8 import quantized

KINDS: dict[str, float | None] = {"n = 0": 0.0, "n = 1": 1.0, "learned": None}
CALIBRATION = 16  # windows of the text that was trained on


@dataclass
class Result:
    """One run; losses are in nats per byte, weights are shares of a row, means over rows, heads and layers."""

    kind: str
    seed: int
    loss: float
    int8_loss: float
    kurtosis: float  # the largest of any block's output
    infinity_norm: float  # the same
    beyond_6_sigma: float  # the share of values of all blocks' outputs
    first_token: float
    first_token_of_a_head: float  # the largest
    to_nothing: float
    to_nothing_of_a_head: float  # the largest

    @property
    def increase(self) -> float:
        return self.int8_loss - self.loss


COLUMNS = "loss", "int8_loss", "increase", "kurtosis", "infinity_norm", "beyond_6_sigma", "first_token", "to_nothing"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.study", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500, help="training steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the weights and the batches")
    parser.add_argument("--every", type=int, default=1, help="measure on every so many windows of the held-out text")
    parser.add_argument("--out", type=Path, default=Path("examples/out"), help="folder of study.json")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    text, held_out = data.load()
    windows = data.all_windows(held_out, CONTEXT)[:: options.every]
    options.out.mkdir(parents=True, exist_ok=True)
    print("kind     seed  " + "  ".join(name.rjust(14) for name in COLUMNS), flush=True)
    results: list[Result] = []
    for seed in options.seeds:
        for kind in KINDS:
            results.append(measured(kind, seed, trained(KINDS[kind], seed, options.steps, text), text, windows))
            print(f"{kind:7}  {seed:4}  {values([results[-1]])}", flush=True)
            stored = [asdict(result) for result in results]
            settings = {"steps": options.steps, "every": options.every, "torch": torch.__version__}
            (options.out / "study.json").write_text(json.dumps({**settings, "runs": stored}, indent=1))
    print(f"\n{summary(results)}")


def trained(n: float | None, seed: int, steps: int, text: Tensor) -> GPT:
    """Train one model; of one seed all start from the same weights and see the same batches."""
    learner, generator = Learner(n, steps, seed), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        learner.step(data.random_windows(text, BATCH, CONTEXT, generator))
    return learner.model


@torch.no_grad()
def measured(kind: str, seed: int, model: GPT, text: Tensor, windows: Tensor) -> Result:
    """Measure a model on held-out windows `(count, CONTEXT + 1)`."""
    with record(model, layers=["blocks.?", "blocks.*.attention"]) as found:
        loss, _ = loss_and_lse(model, windows)
    calibration = data.random_windows(text, CALIBRATION, CONTEXT, torch.Generator().manual_seed(seed))
    int8_loss, _ = loss_and_lse(quantized(model, calibration[:, :-1]), windows)
    heads, blocks = found.attention.values(), [x for name, x in found.activations.items() if name.count(".") == 1]
    first_token = [share for layer in heads for share in layer.first_token]
    to_nothing = [share for layer in heads for share in layer.to_nothing]
    return Result(
        kind,
        seed,
        loss.item(),
        int8_loss.item(),
        max(block.kurtosis for block in blocks),
        max(block.infinity_norm for block in blocks),
        sum(block.beyond_6_sigma for block in blocks) / sum(block.count for block in blocks),
        statistics.mean(first_token),
        max(first_token),
        statistics.mean(to_nothing),
        max(to_nothing),
    )


def values(results: Sequence[Result]) -> str:
    """Return the means of all columns, as a line."""
    means = (statistics.mean(getattr(result, name) for result in results) for name in COLUMNS)
    return "  ".join(f"{mean:14.5g}" for mean in means)


def summary(results: Sequence[Result]) -> str:
    """Return the means of each kind, and how it differs from n = 0, seed by seed."""
    of_kinds = {kind: [result for result in results if result.kind == kind] for kind in KINDS}
    lines = [f"{kind:7}  mean  {values(runs)}" for kind, runs in of_kinds.items()]
    plain = of_kinds["n = 0"]
    for name, what in (("loss", "the loss before int8"), ("increase", "what int8 adds to the loss")):
        for kind in list(KINDS)[1:]:
            pairs = zip(of_kinds[kind], plain, strict=True)
            differences = [getattr(one, name) - getattr(other, name) for one, other in pairs]
            said = ", ".join(f"{difference:+.5f}" for difference in differences)
            lower = sum(difference < 0 for difference in differences)
            lines.append(f"{kind} against n = 0, {what}: {said}; lower in {lower} of {len(differences)} seeds")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
