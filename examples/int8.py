"""int8 per tensor, simulated: what is multiplied in a linear layer is rounded to 255 multiples of one number."""

import copy

import torch
from torch import Tensor, nn


def rounded(x: Tensor, largest: Tensor) -> Tensor:
    """Round x to multiples of `largest / 127`, at most 127 of them on each side of zero."""
    step = largest.clamp_min(torch.finfo(x.dtype).tiny) / 127
    return (x / step).round().clamp(-127, 127) * step


@torch.no_grad()
def quantized(model: nn.Module, calibration: Tensor) -> nn.Module:
    """Return a copy of which the weights and the inputs of every linear layer are int8, one scale for each tensor.

    The scale of a weight is its largest absolute value. That of an input is the largest one in a pass over
    `calibration`, the argument of the model; beyond it inputs are clipped, as they are where scales are static.
    """
    model = copy.deepcopy(model)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    largest: dict[nn.Module, Tensor] = {}

    def measures(module: nn.Module, inputs: tuple[Tensor]) -> None:
        largest[module] = torch.maximum(inputs[0].abs().amax(), largest.get(module, torch.zeros(())))

    def rounds(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return rounded(inputs[0], largest[module])

    handles = [module.register_forward_pre_hook(measures) for module in linears]
    model(calibration)
    for handle in handles:
        handle.remove()
    for module in linears:
        module.weight.copy_(rounded(module.weight, module.weight.abs().amax()))
        module.register_forward_pre_hook(rounds)
    return model
