"""Moments of what comes in parts, merged without loss: neither the values nor their powers are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

CHUNK = 1 << 22  # values that are in float64 at once


@dataclass(frozen=True)
class Distribution:
    """How values are distributed.

    Attributes:
        count: how many values there were.
        mean, variance: of all of them; the variance is divided by their number.
        skewness: the third central moment over the variance to the power 3/2; 0 for symmetric values.
        kurtosis: the fourth central moment over the squared variance; 3 for normal values (the excess kurtosis is this
            minus 3).
        infinity_norm: the largest absolute value.
        beyond_6_sigma: how many values were further than 6 standard deviations from the mean of the tensor that they
            came in, the outliers of "Quantizable Transformers" (Y. Bondarenko et al., 2023).
    """

    count: int
    mean: float
    variance: float
    skewness: float
    kurtosis: float
    infinity_norm: float
    beyond_6_sigma: int


class Moments(NamedTuple):
    """The number of values, their mean, and the sums of the powers 2 to 4 of what they differ from it."""

    number: int
    mean: Tensor
    square: Tensor
    cube: Tensor
    fourth: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        mean = x.mean()
        difference = x - mean
        square = difference * difference
        return cls(x.numel(), mean, square.sum(), (square * difference).sum(), (square * square).sum())

    def merged(self, other: Moments) -> Moments:
        """Return the moments of the values of both, by the formulas of P. Pébay (2008), SAND2008-6212."""
        a, b = float(self.number), float(other.number)
        total, delta = a + b, other.mean - self.mean
        return Moments(
            self.number + other.number,
            self.mean + delta * (b / total),
            self.square + other.square + delta**2 * (a * b / total),
            self.cube
            + other.cube
            + delta**3 * (a * b * (a - b) / total**2)
            + 3 * delta * (a * other.square - b * self.square) / total,
            self.fourth
            + other.fourth
            + delta**4 * (a * b * (a * a - a * b + b * b) / total**3)
            + 6 * delta**2 * (a * a * other.square + b * b * self.square) / total**2
            + 4 * delta * (a * other.cube - b * self.cube) / total,
        )


class Accumulator:
    """The distribution of all values that were added. It stays on their device, and nothing waits for that."""

    def __init__(self) -> None:
        self._moments: Moments | None = None
        self._largest: Tensor | None = None
        self._beyond: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add the values of a floating tensor of any shape; outliers are counted by its own deviation."""
        if not x.numel():
            return
        flat = torch.cat([each.flatten() for each in x.unbind()]) if x.is_nested else x.detach().flatten()
        chunks = [chunk.detach() for chunk in flat.split(CHUNK)]
        found: Moments | None = None
        for chunk in chunks:
            one = Moments.of(chunk.to(wide(chunk.device)))
            found = one if found is None else found.merged(one)
        assert found is not None
        mean, limit = found.mean, 6 * (found.square / found.number).sqrt()
        beyond = torch.stack([((chunk.to(mean.dtype) - mean).abs() > limit).sum() for chunk in chunks]).sum()
        largest = torch.stack([chunk.abs().amax() for chunk in chunks]).amax().to(mean.dtype)
        self._moments = found if self._moments is None else self._moments.merged(found)
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        self._beyond = beyond if self._beyond is None else self._beyond + beyond

    def distribution(self) -> Distribution | None:
        """Return what was added so far, None for nothing. This waits for the device."""
        if self._moments is None or self._largest is None or self._beyond is None:
            return None
        count, *sums = self._moments
        mean, square, cube, fourth = (float(x) for x in sums)
        variance = square / count
        constant = not (variance**2)  # or nearly so
        skewness = math.nan if constant else cube / count / variance**1.5
        kurtosis = math.nan if constant else fourth / count / variance**2
        return Distribution(count, mean, variance, skewness, kurtosis, float(self._largest), int(self._beyond))


def parameters(model: nn.Module) -> dict[str, Distribution]:
    """Return the distribution of the values of each floating parameter, by its name."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            accumulator = Accumulator()
            accumulator.add(parameter)
            distribution = accumulator.distribution()
            if distribution is not None:
                found[name] = distribution
    return found


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype of sums."""
    return torch.float32 if device.type == "mps" else torch.float64
