"""The text: the language reference that every Python carries, as bytes."""

from pydoc_data.topics import topics

import torch
from torch import Tensor


def load() -> tuple[Tensor, Tensor]:
    """The text for training `(T,)` and the last tenth of it, held out; both int64 in [0, 256).

    Topics quote one another at length: without repeated paragraphs, nothing that is held out is learned by heart.
    """
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    text = torch.tensor(list("\n\n".join(dict.fromkeys(paragraphs)).encode()))
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def random_windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`(count, length + 1)`: the inputs, and one byte further the targets."""
    starts = torch.randint(len(text) - length, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(length + 1)]


def all_windows(text: Tensor, length: int) -> Tensor:
    """`(windows, length + 1)`: the whole text, one window behind the other."""
    return text.unfold(0, length + 1, length)
