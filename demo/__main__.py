"""Trains the same GPT with n = 0 and with n = 1, compares the losses and shows which heads attend to nothing."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from demo import data
from demo.picture import draw
from demo.train import Run, train


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m demo", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500, help="training steps of each run")
    parser.add_argument("--out", type=Path, default=Path("demo/out"), help="folder of the picture and the results")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches, the same in both runs")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    text, held_out = data.load()
    print(f"Text: Python's language reference, {len(text):,} bytes to train on and {len(held_out):,} held out.")
    plain, offset = train((0.0, 1.0), text, held_out, options.steps, options.seed)

    options.out.mkdir(parents=True, exist_ok=True)
    picture, results = options.out / "demo.png", options.out / "results.json"
    draw(plain, offset, picture)
    settings = {"steps": options.steps, "seed": options.seed, "threads": options.threads, "torch": torch.__version__}
    results.write_text(json.dumps({**settings, "runs": [asdict(plain), asdict(offset)]}, indent=1))
    print(f"\n{report(plain, offset)}\n\nPicture: {picture}\nNumbers: {results}")


def report(plain: Run, offset: Run) -> str:
    """Return two tables as text, with a note on what they do not show."""
    lines = ["     n   held-out nats/byte   bits/byte   ms/step"]
    for run in (plain, offset):
        loss = run.final_loss
        lines.append(f"{run.n:6g}   {loss:18.4f}   {loss / math.log(2):9.4f}   {run.ms_per_step:7.1f}")
    difference = offset.final_loss - plain.final_loss
    lines += [
        f"\nn = {offset.n:g} minus n = {plain.n:g}: {difference:+.4f} nats/byte."
        " One pair of runs of a small model does not say which n is better.",
        f"\nShare of attention to nothing, n = {offset.n:g} (n = 0: 0 by definition)",
        " layer   mean of heads   largest head",
    ]
    for layer, shares in enumerate(offset.share_to_nothing):
        mean, largest = sum(shares) / len(shares), max(shares)
        lines.append(f"{layer:6}   {mean:13.2%}   {largest:6.2%} (head {shares.index(largest)})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
