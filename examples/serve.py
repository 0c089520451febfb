"""Serves sequences that come and go: greedy decoding over one paged KV cache, which they share.

The model is the demo's GPT with learned sinks, after a short training. A request waits until there are blocks for all
of its tokens. Its prompt is then read in one pass, and from there on it decodes in one batch with the others, a token
a step. When it ends, its blocks are free for the next. Each request prints a line when it is done.
"""

import argparse
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import gelu

from attn_n import flash_attention_n_with_kvcache
from demo import data
from demo.model import GPT, normalize, rotary_angles
from demo.train import BATCH, CONTEXT, Learner


@dataclass
class Request:
    """A prompt, and how many tokens are to follow it."""

    prompt: list[int]
    new: int
    tokens: list[int] = field(default_factory=list)  # what has followed it so far
    blocks: list[int] = field(default_factory=list)  # of the cache, which are its own while it runs

    @property
    def keys(self) -> int:
        """How many keys it has in the cache: the last token is not in it yet."""
        return len(self.prompt) + len(self.tokens) - 1


class Server:
    """A model, the blocks of its cache, and the requests that wait and run.

    Args:
        blocks: how many blocks the cache has.
        block: how many keys a block holds.
    """

    def __init__(self, model: GPT, blocks: int, block: int) -> None:
        self.model = model
        self.block = block
        self.free = list(range(blocks))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        like = model.embedding.weight
        shape = blocks, model.blocks[0].attention.heads, block, model.head_dim
        self.pages = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in model.blocks]
        angles = rotary_angles(blocks * block, model.head_dim).to(like)
        self.rotary = angles.cos(), angles.sin()

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises:
            ValueError: the whole cache has too few blocks for it.
        """
        needed, blocks = self.needed(request), self.pages[0][0].shape[0]
        if needed > blocks:
            raise ValueError(f"request: expected at most {blocks} blocks of {self.block} keys, got one of {needed}")
        self.waiting.append(request)

    def needed(self, request: Request) -> int:
        """Return the blocks of a request: all of its tokens are cached but the last."""
        return math.ceil((len(request.prompt) + request.new - 1) / self.block)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Give every request that runs, or now begins, one more token; return those that are done."""
        decoding = list(self.running)
        while self.waiting and self.needed(self.waiting[0]) <= len(self.free):
            request = self.waiting.popleft()
            request.blocks = [self.free.pop() for _ in range(self.needed(request))]
            request.tokens += self.next_tokens([request], torch.tensor([request.prompt]), torch.tensor([0]))
            self.running.append(request)
        if decoding:
            last, keys = [[request.tokens[-1]] for request in decoding], [request.keys for request in decoding]
            following = self.next_tokens(decoding, torch.tensor(last), torch.tensor(keys))
            for request, token in zip(decoding, following, strict=True):
                request.tokens.append(token)
        done = [request for request in self.running if len(request.tokens) == request.new]
        for request in done:
            self.running.remove(request)
            self.free += request.blocks
        return done

    def next_tokens(self, requests: list[Request], tokens: Tensor, lengths: Tensor) -> list[int]:
        """Return the likeliest token behind each sequence.

        Args:
            tokens: `(B, L)`, new ones; their keys and values are written into the cache.
            lengths: `(B,)`, how many keys each sequence has there before.
        """
        model, device = self.model, self.pages[0][0].device
        table = torch.zeros(len(requests), max(len(request.blocks) for request in requests), dtype=torch.int32)
        for row, request in zip(table, requests, strict=True):
            row[: len(request.blocks)] = torch.tensor(request.blocks)
        tokens, table, lengths = tokens.to(device), table.to(device), lengths.to(device, torch.int32)
        x = model.embedding(tokens)
        for block, (k_pages, v_pages) in zip(model.blocks, self.pages, strict=True):
            attention = block.attention
            q, k, v = attention.qkv(normalize(x)).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
            out = flash_attention_n_with_kvcache(
                q, k_pages, v_pages, k, v, cache_seqlens=lengths, block_table=table, sm_n=attention.n,
                sinks=attention.sinks, rotary_cos=self.rotary[0], rotary_sin=self.rotary[1], rotary_interleaved=False,
            )  # fmt: skip
            x = x + attention.out(out.transpose(1, 2).flatten(2))
            x = x + block.down(gelu(block.up(normalize(x))))
        return model.head(normalize(x[:, -1])).argmax(-1).tolist()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.serve", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50, help="training steps of the model")
    parser.add_argument("--requests", type=int, default=12, help="how many come, one every four steps")
    parser.add_argument("--blocks", type=int, default=32, help="blocks of the cache")
    parser.add_argument("--block", type=int, default=16, help="keys of a block")
    parser.add_argument("--seed", type=int, default=0, help="of the model and the requests")
    parser.add_argument("--device", default="cpu", help="where the model serves; it is trained on the CPU")
    options = parser.parse_args(arguments)

    text, held_out = data.load()
    learner, generator = Learner(None, options.steps, options.seed), torch.Generator().manual_seed(options.seed)
    for _ in range(options.steps):
        learner.step(data.random_windows(text, BATCH, CONTEXT, generator))
    server = Server(learner.model.to(options.device), options.blocks, options.block)
    coming = deque(random_request(held_out, generator) for _ in range(options.requests))
    step, began, most, tokens = 0, time.perf_counter(), 0, 0
    while coming or server.waiting or server.running:
        if coming and step % 4 == 0:
            server.submit(coming.popleft())
        for request in server.step():
            tokens += request.new
            prompt, new = bytes(request.prompt), bytes(request.tokens)
            print(
                f"step {step:3}: {len(request.prompt):3} + {request.new:2} tokens in {len(request.blocks)} blocks,"
                f" {len(server.running)} run, {len(server.waiting)} wait: {prompt[-20:]!r} -> {new!r}",
                flush=True,
            )
        most = max(most, len(server.running))
        step += 1
    seconds = time.perf_counter() - began
    print(f"{tokens} tokens in {step} steps, {tokens / seconds:.0f} a second; at most {most} sequences at once")


def random_request(text: Tensor, generator: torch.Generator) -> Request:
    """Return a request for 8 to 64 tokens behind a prompt of 8 to 128."""
    length, new = (int(torch.randint(8, high + 1, (), generator=generator)) for high in (128, 64))
    return Request(data.random_windows(text, 1, length - 1, generator)[0].tolist(), new)


if __name__ == "__main__":
    main()
