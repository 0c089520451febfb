"""Fine-tunes gpt-oss with attn_n as the attention of transformers: packed documents, no L x S mask, trained sinks.

By default the model is tiny and random, and the text is the one that the demo trains on; this runs on a CPU. For a
checkpoint, which is trained in part to fit one GPU:

    python -m examples.gpt_oss_finetune --model openai/gpt-oss-20b --data mine.jsonl --only self_attn --length 4096 \\
        --dtype bfloat16 --checkpointing --device cuda --out tuned

Documents follow one another in rows of `--length` tokens. `position_ids` that begin anew keep them apart: attn_n reads
them as packed sequences.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GptOssConfig, Mxfp4Config

from attn_n.integrations.transformers import register
from demo import data

Encode = Callable[[str], list[int]]
IGNORED = -100  # the label of a token that is not predicted, for transformers


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.gpt_oss_finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="a checkpoint: a folder, or its name on the hub; else tiny and random")
    parser.add_argument("--data", type=Path, help='documents: .jsonl with "text", or text parted by blank lines')
    parser.add_argument("--only", nargs="+", default=[""], help="train parameters alone that have this in their names")
    parser.add_argument("--steps", type=int, default=40, help="training steps (40)")
    parser.add_argument("--rows", type=int, default=2, help="rows of a step, one after the other (2)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (256)")
    parser.add_argument("--lr", type=float, help="learning rate (1e-5 for a checkpoint, else 3e-3)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of what is not trained, and of matmuls"
    )
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward")
    parser.add_argument("--device", default="cpu", help="where to run (cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the rows, and of a random model (0)")
    parser.add_argument("--out", type=Path, help="folder for the model that was trained")
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    register()
    model, encode = checkpoint(options) if options.model else tiny()
    model.to(options.device).train()
    if options.checkpointing:
        model.gradient_checkpointing_enable()
    trained = to_train(model, options.only)
    before = {name: x.detach().clone() for name, x in trained.items() if name.endswith(".sinks")}
    optimizer = torch.optim.AdamW(trained.values(), lr=options.lr or (1e-5 if options.model else 3e-3))
    rows = packed([encode(document) for document in documents(options.data)], options.length).to(options.device)
    if rows.shape[1] < 2:
        raise ValueError(f"data: expected at least two rows of {options.length} tokens, got {rows.shape[1]}")
    last = max(1, min(16, rows.shape[1] // 10))
    rows, held_out = rows[:, :-last], rows[:, -last:]
    print(f"{rows.shape[1]} rows of {options.length} tokens; held-out loss {evaluated(model, held_out, options):.4f}")
    order = shuffled(rows.shape[1])
    for step in range(1, options.steps + 1):
        start = time.perf_counter()
        total = 0.0
        for _ in range(options.rows):
            loss = loss_of(model, rows[:, next(order)], options) / options.rows
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, options.steps // 10) == 0:
            moved = max(((trained[name].detach() - x).abs().max().item() for name, x in before.items()), default=0.0)
            seconds = time.perf_counter() - start
            print(f"step {step}: loss {total:.4f}, sinks moved by up to {moved:.4f}, {seconds:.2f} s", flush=True)
    print(f"held-out loss {evaluated(model, held_out, options):.4f}")
    if options.out:
        model.to(getattr(torch, options.dtype)).save_pretrained(options.out)
        if options.model:
            AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)


def tiny() -> tuple[Any, Encode]:
    """Return a gpt-oss of two layers with random weights, whose tokens are bytes."""
    config = GptOssConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=64,
        pad_token_id=None, eos_token_id=0, attn_implementation="attn_n",
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config), lambda text: [*text.encode(), 0]


def checkpoint(options: argparse.Namespace) -> tuple[Any, Encode]:
    """Return the model of a checkpoint, and its tokenizer."""
    quantized = getattr(AutoConfig.from_pretrained(options.model), "quantization_config", None)
    # The experts of gpt-oss are stored in four bits, of which there is no gradient.
    keywords = {"quantization_config": Mxfp4Config(dequantize=True)} if quantized else {}
    model = AutoModelForCausalLM.from_pretrained(
        options.model, attn_implementation="attn_n", dtype=getattr(torch, options.dtype), **keywords
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    return model, lambda text: [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def to_train(model: torch.nn.Module, only: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    """Freeze all parameters but those with one of these in their names, and return those, in float32.

    In bfloat16 they would not move: most steps are smaller than its rounding.
    """
    trained = {name: x for name, x in model.named_parameters() if any(part in name for part in only)}
    if not trained:
        raise ValueError(f"only: expected parts of the names of parameters, got {only}, which fit none")
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_()
    return trained


def documents(path: Path | None) -> list[str]:
    """Return the documents of a file, or paragraphs of the demo's text."""
    if path is None:
        text = bytes(data.load()[0].tolist()).decode(errors="ignore")  # it may be cut within a character
        return text.split("\n\n")
    text = path.read_text()
    return [json.loads(line)["text"] for line in text.splitlines()] if path.suffix == ".jsonl" else text.split("\n\n")


def packed(encoded: Sequence[list[int]], length: int) -> Tensor:
    """Return `(3, rows, length)` int64: tokens, positions within their documents, and labels.

    A document that does not fit a row goes on in the next as another one. What comes first in a document is predicted
    from nothing.
    """
    tokens = torch.tensor([token for document in encoded for token in document])
    begins = torch.tensor([i == 0 for document in encoded for i in range(len(document))])
    count = len(tokens) // length
    tokens, begins = (x[: count * length].view(count, length) for x in (tokens, begins))
    index = torch.arange(length).expand(count, length)
    positions = index - torch.where(begins, index, 0).cummax(1).values
    return torch.stack([tokens, positions, tokens.masked_fill(positions == 0, IGNORED)])


def shuffled(count: int) -> Iterator[int]:
    """Yield the rows in random order, again and again."""
    while True:
        yield from torch.randperm(count).tolist()


def loss_of(model: torch.nn.Module, row: Tensor, options: argparse.Namespace) -> Tensor:
    """Return the mean loss of a row `(3, length)`; transformers takes one packed row at a time."""
    tokens, positions, labels = row[:, None]
    with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
        return model(tokens, position_ids=positions, labels=labels, use_cache=False).loss


@torch.no_grad()
def evaluated(model: torch.nn.Module, rows: Tensor, options: argparse.Namespace) -> float:
    """Return the mean loss of rows `(3, rows, length)`."""
    return torch.stack([loss_of(model, row, options) for row in rows.unbind(1)]).mean().item()


if __name__ == "__main__":
    main()
