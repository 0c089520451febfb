"""The mask function: what transformers says of a mask, as lengths and windows where that is possible."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from attn_n.integrations.transformers.pattern import MaskPattern, Rule, Visible, Window

logger = logging.getLogger(__name__)

MaskFunction = Callable[..., Any]


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    dtype: torch.dtype | None = None,
    config: Any = None,
    **unknown: Any,
) -> MaskPattern:
    """Return the mask of queries `q_offset + i` and keys `kv_offset + j`, for our attention function.

    The arguments are those of `transformers.masking_utils.sdpa_mask`. Where padding is to be found in
    `attention_mask` `(N, S)`, that is read once, here; the layers read nothing.
    """
    if others := sorted(name for name, value in unknown.items() if value is not None):
        raise TypeError(f"attn_n's mask function does not know the argument(s) {', '.join(others)}")
    build = functools.partial(
        masking_utils.sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    shape = batch_size, 1, q_length, kv_length
    rule, visible = rule_of(mask_function), None
    if torch.compiler.is_compiling() and allow_is_causal_skip and local_size is not None:
        # Nothing was combined with a causal window, or transformers would not allow it to be skipped.
        window = getattr(config, "sliding_window", None) == local_size
        rule = Rule(True, (local_size - 1, None)) if window and not hasattr(config, "attention_chunk_size") else None
    if rule is not None:
        padding = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]
        visible = _visible(rule, shape, q_offset, kv_offset, padding, device)
    if visible is not None:
        return MaskPattern.of(shape, device, rule, visible, build)
    if not torch.compiler.is_compiling():  # which takes no logging
        _say_once(getattr(mask_function, "__qualname__", repr(mask_function)))
    dense = build()
    return MaskPattern.of(shape, device, rule, None, lambda: dense)


@functools.cache
def _say_once(name: str) -> None:
    logger.warning("attn_n makes a dense L x S mask for %s: windows and lengths cannot say what it says", name)


def rule_of(mask_function: MaskFunction) -> Rule | None:
    """Return what a mask function of transformers means, or None if it is something else."""
    if mask_function is masking_utils.causal_mask_function:
        return Rule(causal=True)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Rule()
    if torch.compiler.is_compiling():  # which does not show the variables that a function closes over
        return None
    if getattr(mask_function, "__module__", None) != masking_utils.__name__ or not mask_function.__closure__:
        return None
    names = mask_function.__code__.co_freevars
    closed = dict(zip(names, (cell.cell_contents for cell in mask_function.__closure__), strict=True))
    match mask_function.__qualname__.split(".")[0]:
        case "sliding_window_overlay":
            return Rule(window=(closed["sliding_window"] - 1, None))
        case "sliding_window_bidirectional_overlay":
            return Rule(window=(closed["sliding_window"], closed["sliding_window"]))
        case "chunked_overlay":
            return Rule(chunk=closed["chunk_size"], chunks_begin=closed["left_padding"])
        case "packed_sequence_mask_function":
            return Rule(sequences=closed["packed_sequence_mask"])
        case "and_masks":
            return _both(closed["mask_functions"])
    return None


def _both(functions: tuple[MaskFunction, ...]) -> Rule | None:
    """Return the rule for keys that all functions let through."""
    found = Rule()
    renumbered = [f for f in functions if f.__qualname__.startswith("remap_positions_for_packed_sequence.")]
    # Positions that count on within a sequence differ from indices by a constant, which no rule sees.
    inner = [f.__closure__[f.__code__.co_freevars.index("mask_function")].cell_contents for f in renumbered]  # type: ignore[index]
    for rule in map(rule_of, [*(f for f in functions if f not in renumbered), *inner]):
        if rule is None or (found.chunk and rule.chunk) or (found.sequences is not None and rule.sequences is not None):
            return None
        found = Rule(
            found.causal or rule.causal,
            (_least(found.window[0], rule.window[0]), _least(found.window[1], rule.window[1])),
            found.chunk or rule.chunk,
            rule.chunks_begin if found.chunks_begin is None else found.chunks_begin,
            rule.sequences if found.sequences is None else found.sequences,
        )
    return found if not renumbered or found.sequences is not None else None


def _least(a: int | None, b: int | None) -> int | None:
    return a if b is None else b if a is None else min(a, b)


def _visible(
    rule: Rule,
    shape: tuple[int, int, int, int],
    q_offset: int | Tensor,
    kv_offset: int,
    padding: Tensor | None,
    device: torch.device | str,
) -> Visible | None:
    """Return the keys that `rule` and `padding` `(N, up to S)` leave, or None if only a dense mask can say it."""
    batch, _, len_q, len_k = shape
    shift = q_offset - kv_offset  # query i stands at key i + shift
    if rule.sequences is not None:
        plain = rule.chunk is None and padding is None and isinstance(shift, int) and shift == 0 and len_q == len_k
        return _packed(rule, rule.sequences) if plain else None
    if rule.chunk is not None:
        return _chunked(rule, shape, shift, kv_offset, padding)

    end = len_k if padding is None else padding.shape[1]  # keys behind the padding mask are not seen either
    first = last = key_mask = None
    if padding is not None:
        first, last, key_mask = _ends(padding, len_k)
    if not rule.causal and rule.window == (None, None):
        return _cut(Visible(seqused_k=last, leftpad_k=first, key_mask=key_mask), end, len_k)
    if isinstance(shift, int) and last is None:
        stop = shift + len_q
        # A length in a tensor, not in Python, lets a compiled decoding step serve the next one too.
        if rule.causal and stop <= end and (len_q > 1 or stop == len_k):
            window = _with_effect(rule.window, stop)
            causal = len_q > 1 or window != (None, None)
            return _cut(Visible(causal, window, leftpad_k=first, key_mask=key_mask), stop, len_k)
        if stop == len_k == end:
            return Visible(rule.causal, rule.window, leftpad_k=first, key_mask=key_mask)
    if not rule.causal and not (isinstance(shift, int) and shift == 0 and len_q == len_k):
        return None  # a window to the right would reach beyond the last query
    # The diagonal is that of the lengths in use, so that these go up to the last query.
    used_k = torch.as_tensor(shift + len_q, device=device).to(torch.int32).expand(batch)
    used_k = used_k.clamp_max(end) if last is None else torch.minimum(used_k, last)
    known = isinstance(shift, int) and shift + len_q <= end
    used_q = None if last is None and (known or len_q == 1) else (used_k - shift).clamp_min(0).to(torch.int32)
    return Visible(rule.causal, rule.window, None, used_q, used_k.contiguous(), first, key_mask)


def _cut(visible: Visible, keys: int, len_k: int) -> Visible:
    """Return what is seen of the first `keys` keys."""
    if keys == len_k:
        return visible
    mask = visible.key_mask
    return visible._replace(keys=keys, key_mask=None if mask is None else mask[..., :keys])


def _with_effect(window: Window, keys: int) -> Window:
    """Return a window without sides that reach beyond the first of `keys` keys."""
    left, right = window
    return (None if left is not None and left >= keys - 1 else left), right


def _ends(padding: Tensor, len_k: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the first key of each row, the one behind its last, both `(N,)` or None for all, and a mask of keys.

    With holes between a row's keys there is the mask `(N, 1, 1, S)` alone. So there is where nothing can be read.
    """
    if not _readable(padding):
        return None, None, _mask_of_keys(padding, len_k)
    count = padding.sum(1, dtype=torch.int32)
    if bool((count == padding.shape[1]).all()):
        return None, None, None
    index = torch.arange(padding.shape[1], dtype=torch.int32, device=padding.device)
    last = torch.where(padding, index + 1, 0).amax(1).to(torch.int32)
    first = torch.minimum(torch.where(padding, index, padding.shape[1]).amin(1).to(torch.int32), last)
    left, right, holes = torch.stack(
        [(first > 0).any(), (last < padding.shape[1]).any(), (last - first != count).any()]
    ).tolist()
    if holes:
        return None, None, _mask_of_keys(padding, len_k)
    return first if left else None, last if right else None, None


def _mask_of_keys(padding: Tensor, len_k: int) -> Tensor:
    return torch.nn.functional.pad(padding, (0, len_k - padding.shape[1]))[:, None, None, :]


def _readable(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _packed(rule: Rule, sequences: Tensor) -> Visible | None:
    """Return packed sequences, `(N, L)` numbers of them, as varlen ones: row behind row."""
    if not _readable(sequences):
        return None
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    starts = begins.flatten().nonzero()[:, 0].to(torch.int32)
    cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=sequences.numel())
    longest = int(cu_seqlens.diff().max())
    return Visible(rule.causal, _with_effect(rule.window, longest), cu_seqlens=cu_seqlens, max_seqlen=longest)


def packed_by(mask: MaskPattern, position_ids: Tensor | None) -> Visible | None:
    """Return what is seen if `position_ids` `(N or 1, L)` say that rows hold several sequences, or None.

    Some models do not show them to the mask function (gpt-oss: its sequences would see each other). They are read once
    for each mask, by the first layer. Where nothing can be read, it is an error that rows hold several sequences.
    """
    rule, visible = mask.rule, mask.visible
    batch, _, len_q, len_k = mask.shape
    if position_ids is None or rule is None or not rule.causal or rule.chunk is not None or visible is None:
        return None
    alone = all(x is None for x in visible._replace(key_mask=None)[2:-1])  # no padding, no cache
    if not alone or len_q != len_k or len_q == 1:
        return None
    if position_ids.dim() != 2 or position_ids.shape[1] != len_q or position_ids.shape[0] not in (1, batch):
        return None
    if not _readable(position_ids):
        if mask.packed is None:
            mask.packed = position_ids, None
            _assert_one_sequence(position_ids, visible.key_mask)
        return None
    if visible.key_mask is not None:
        return None
    if mask.packed is None or mask.packed[0] is not position_ids:
        sequences = masking_utils.find_packed_sequence_indices(position_ids.expand(batch, -1))
        mask.packed = position_ids, None if sequences is None else _packed(rule, sequences)
    return mask.packed[1]


def _assert_one_sequence(position_ids: Tensor, key_mask: Tensor | None) -> None:
    """Let it be an error, of the device, if positions `(N or 1, L)` of neighbouring tokens are not consecutive."""
    consecutive = position_ids.diff(dim=1) == 1
    if key_mask is not None:
        tokens = key_mask[:, 0, 0]
        consecutive = consecutive | ~(tokens[:, 1:] & tokens[:, :-1])
    torch._assert_async(
        consecutive.all(),
        "position_ids: attn_n cannot look for packed sequences in compiled code or a CUDA graph; pass cu_seq_lens_q,"
        " cu_seq_lens_k, max_length_q and max_length_k too",
    )


def _chunked(
    rule: Rule, shape: tuple[int, int, int, int], shift: int | Tensor, kv_offset: int, padding: Tensor | None
) -> Visible | None:
    """Return chunks as varlen sequences, or for one query as the keys from the beginning of its chunk on."""
    batch, _, len_q, len_k = shape
    chunk, begin = rule.chunk, rule.chunks_begin
    assert chunk is not None
    assert begin is not None
    if not rule.causal or rule.window != (None, None):
        return None
    tokens = (shift + len_q if isinstance(shift, int) else len_k) + kv_offset
    if tokens <= chunk:
        return _visible(Rule(causal=True), shape, shift, kv_offset, padding, begin.device)
    if not isinstance(shift, int):
        return None
    first = last = key_mask = None
    if padding is not None:
        first, last, key_mask = _ends(padding, len_k)
    if key_mask is not None or (padding is not None and padding.shape[1] < shift + len_q):
        return None
    if len_q == 1 and last is None:
        position = shift + kv_offset - begin
        chunks_first = begin + torch.div(position, chunk, rounding_mode="floor") * chunk - kv_offset
        seen = chunks_first.clamp_min(0).to(torch.int32)
        return _cut(Visible(leftpad_k=seen if first is None else torch.maximum(first, seen)), shift + 1, len_k)
    if shift != 0 or kv_offset != 0 or len_q > len_k:
        return None
    # A row's padding on the left ends where a chunk begins, and no query sees what follows it: both need no length.
    starts = begin[:, None] % chunk + chunk * torch.arange(-(-len_q // chunk), device=begin.device)
    starts = torch.nn.functional.pad(starts.clamp_max(len_q), (1, 0))
    starts = starts + len_q * torch.arange(batch, device=begin.device)[:, None]
    cu_seqlens = torch.nn.functional.pad(starts.flatten(), (0, 1), value=batch * len_q).to(torch.int32)
    return _cut(Visible(True, cu_seqlens=cu_seqlens, max_seqlen=min(chunk, len_q)), len_q, len_k)
