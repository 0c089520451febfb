"""The names under which models of transformers find us."""

from __future__ import annotations

import functools
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash_utils

from attn_n.compat import flash_attn
from attn_n.integrations.transformers.attention import attention
from attn_n.integrations.transformers.layers import NAMES
from attn_n.integrations.transformers.loading import restore_on_loading
from attn_n.integrations.transformers.masks import attention_mask
from attn_n.integrations.transformers.sharding import register_style


def register(name: str = "attn_n") -> None:
    """Make `attn_implementation=name` and `model.set_attn_implementation(name)` run attention by attn_n.

    The mask function is registered with it. Without one, transformers makes no mask at all, and padding, windows and
    packed sequences would be ignored in silence.

    Continuous batching takes names with "flash" in them alone, so that `flash_` + name is registered too. Models with
    sinks list the flash implementations that know these (`_compatible_flash_implementations`), and quietly replace any
    other one: ours is added to the list of each model that asks for it.
    """
    if not isinstance(name, str) or not name or "|" in name or "/" in name:
        raise ValueError(
            f"name: expected a name without | and /, which mean other things to transformers, got {name!r}"
        )
    for each in (name, f"flash_{name}"):
        for key in (each, f"paged|{each}"):
            AttentionInterface.register(key, attention)
            AttentionMaskInterface.register(key, attention_mask)
            NAMES.add(key)
    _let_flash_names_pass()
    restore_on_loading()
    register_style()


@functools.cache
def _let_flash_names_pass() -> None:
    """Teach transformers our names with "flash" in them, which it would look for among FlashAttention's packages."""
    found, check = flash_utils._lazy_imports, PreTrainedModel._check_and_adjust_attn_implementation

    @functools.wraps(found)
    def imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation not in NAMES:
            return found(implementation, *args, **kwargs)
        functions = flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func, flash_attn.flash_attn_with_kvcache
        return *functions, flash_utils._pad_input, flash_utils._unpad_input

    @functools.wraps(check)
    def checked(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        compatible = self._compatible_flash_implementations
        name = (attn_implementation or "").removeprefix("paged|")
        if compatible is not None and name in NAMES and name not in compatible:
            compatible.append(name)
        return check(self, attn_implementation, *args, **kwargs)

    flash_utils._lazy_imports = imports
    PreTrainedModel._check_and_adjust_attn_implementation = checked
