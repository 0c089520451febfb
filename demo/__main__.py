"""Trains the same small GPT with n = 0 and with n = 1, and shows where the attention of each head goes.

It takes at most three minutes on two cores: a few steps are timed first, and say how many there will be.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from demo import data
from demo.picture import draw
from demo.train import CONTEXT, Run, steps_within, train

SECONDS = 120  # of training and measuring; the rest of three minutes is for what else there is, and if time runs short


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m demo", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, help="training steps of each run, rather than as many as there is time for"
    )
    parser.add_argument("--out", type=Path, default=Path("demo/out"), help="folder of the picture and the results")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches, the same in both runs")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    text, held_out = data.load()
    print(f"Text: Python's language reference, {len(text):,} bytes to train on and {len(held_out):,} held out.")
    if options.steps is None:
        steps, seconds = steps_within(SECONDS, 2, text, held_out)
        print(f"A few steps were timed: {steps} steps of each of the two models take about {seconds:.0f} s here.")
        plain, offset = train((0.0, 1.0), text, held_out, steps, options.seed, SECONDS)
    else:
        plain, offset = train((0.0, 1.0), text, held_out, options.steps, options.seed)

    options.out.mkdir(parents=True, exist_ok=True)
    picture, results = options.out / "demo.png", options.out / "results.json"
    draw(plain, offset, picture)
    settings = {
        "steps": len(plain.train_loss),
        "seed": options.seed,
        "threads": options.threads,
        "torch": torch.__version__,
    }
    results.write_text(json.dumps({**settings, "runs": [asdict(plain), asdict(offset)]}, indent=1))
    print(f"\nNumbers: {results}\nPicture: {picture}")
    print("\n".join(f"- {line}" for line in findings(plain, offset)))


def findings(plain: Run, offset: Run) -> list[str]:
    """Return three lines on what the picture shows."""
    nothing, first, of_plain = (
        [share for layer in layers for share in layer]
        for layers in (offset.to_nothing, offset.first_token, plain.first_token)
    )
    of_row = max(share for heads in offset.to_nothing_in_excerpt for shares in heads for share in shares)
    even = sum(1 / keys for keys in range(1, CONTEXT + 1)) / CONTEXT
    return [
        f"With n = {offset.n:g} heads may attend to nothing: {mean_and_largest(nothing)}, and up to {of_row:.0%} at"
        f" a byte of the excerpt. With n = {plain.n:g} each row has to hand out all of its attention.",
        f"On the first token they put {mean_and_largest(of_plain)} with n = {plain.n:g}, and {mean_and_largest(first)}"
        f" with n = {offset.n:g}; even attention would put {even:.1%} there.",
        f"The loss on held-out text is {plain.final_loss:.3f} nats a byte with n = {plain.n:g}, and"
        f" {offset.final_loss:.3f} with n = {offset.n:g}; one pair of small models does not say which is better.",
    ]


def mean_and_largest(shares: list[float]) -> str:
    return f"{sum(shares) / len(shares):.1%} on average, {max(shares):.1%} in one head"


if __name__ == "__main__":
    main()
