"""The text: the language reference that every Python carries, as bytes."""

from pydoc_data.topics import topics

import torch
from torch import Tensor


def load() -> tuple[Tensor, Tensor]:
    """Return the text for training `(T,)` and its last tenth, which is held out; both int64 in [0, 256).

    Topics quote one another at length. Repeated paragraphs are dropped, so that training never sees held-out ones.
    """
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    text = torch.tensor(list("\n\n".join(dict.fromkeys(paragraphs)).encode()))
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def random_windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return `(count, length + 1)` bytes: inputs, and targets one byte further."""
    starts = torch.randint(len(text) - length, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(length + 1)]


def all_windows(text: Tensor, length: int) -> Tensor:
    """Return `(windows, length + 1)` bytes: the whole text, cut into consecutive windows."""
    return text.unfold(0, length + 1, length)
