"""Tiny models of transformers with random weights, in which sinks and windows matter."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", "5.17")

VOCABULARY, LENGTH = 61, 13


class Tiny(NamedTuple):
    model: str  # the class; its config has the name of `config`
    config: str
    fields: dict[str, Any]
    sinks: bool = False
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-5
    dense: bool = False  # its masks are dense ones, of its own or because no window says what they say


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2}
MOE = {"num_experts_per_tok": 2}
BOTH = ["sliding_attention", "full_attention"]
# Each query sees the five keys that its indexer chooses.
SPARSE = SMALL | MOE | {
    "num_key_value_heads": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "index_topk": 5, "index_head_dim": 16, "index_n_heads": 2, "n_routed_experts": 4, "moe_intermediate_size": 16,
    "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip

DECODERS = {
    "gpt_oss": Tiny(
        "GptOssForCausalLM", "GptOssConfig",
        GROUPED | MOE | {"num_local_experts": 4, "head_dim": 16, "sliding_window": 5}, sinks=True,
    ),
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen3": Tiny("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 8}),
    "mistral": Tiny("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 4, "head_dim": 8}),
    "gemma2": Tiny(
        "Gemma2ForCausalLM", "Gemma2Config", GROUPED | {"sliding_window": 4, "head_dim": 8, "layer_types": BOTH}
    ),
    "gemma3": Tiny(
        "Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED | {"sliding_window": 4, "head_dim": 8, "layer_types": BOTH}
    ),
    "granite_swa": Tiny(
        "GraniteSWAForCausalLM", "GraniteSWAConfig", GROUPED | {"sliding_window": 4, "layer_types": BOTH}, sinks=True
    ),
    "mimo_v2_flash": Tiny(
        "MiMoV2FlashForCausalLM", "MiMoV2FlashConfig",
        GROUPED | MOE | {
            "head_dim": 12, "v_head_dim": 8, "sliding_window": 4, "layer_types": BOTH, "n_routed_experts": 4,
            "moe_intermediate_size": 16, "mlp_layer_types": ["dense", "sparse"],
        }, sinks=True,
    ),
    "llama4": Tiny(
        "Llama4ForCausalLM", "Llama4TextConfig",
        GROUPED | {
            "intermediate_size_mlp": 24, "attention_chunk_size": 4, "head_dim": 8, "num_local_experts": 2,
            "layer_types": ["chunked_attention", "full_attention"],
        }, dense=True,
    ),
    "deepseek_v4": Tiny(
        "DeepseekV4ForCausalLM", "DeepseekV4Config",
        SMALL | MOE | {
            "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16, "n_routed_experts": 4,
            "moe_intermediate_size": 16, "sliding_window": 4, "o_groups": 2, "o_lora_rank": 8, "index_n_heads": 2,
            "index_head_dim": 16, "index_topk": 4, "num_hidden_layers": 3, "hc_mult": 2, "num_nextn_predict_layers": 0,
        }, sinks=True, dense=True,
    ),
    "hy_v4": Tiny(  # the gradient of attn_hc.scale is a small sum of large numbers
        "HYV4ForCausalLM", "HYV4Config", SPARSE | {"hc_mult": 2}, sinks=True, tolerance=3e-5, dense=True
    ),
    "deepseek_v32": Tiny("DeepseekV32ForCausalLM", "DeepseekV32Config", SPARSE, dense=True),
    "flint": Tiny("FlintForCausalLM", "FlintConfig", GROUPED | {"sliding_window": 4}, sinks=True),
    "inkling2": Tiny(
        "Inkling2ForCausalLM", "Inkling2TextConfig", GROUPED, sinks=True, dtype=torch.float32, tolerance=1e-3,
        dense=True,
    ),
}  # fmt: skip

ENCODERS = {
    "bert": Tiny("BertModel", "BertConfig", SMALL),
    "modernbert": Tiny(
        "ModernBertModel", "ModernBertConfig", SMALL | {"local_attention": 8, "global_attn_every_n_layers": 2}
    ),
    "openai_privacy_filter": Tiny(
        "OpenAIPrivacyFilterForTokenClassification", "OpenAIPrivacyFilterConfig",
        GROUPED | MOE | {"num_local_experts": 4, "head_dim": 16, "sliding_window": 3}, sinks=True,
    ),
}  # fmt: skip


def make(tiny: Tiny, dtype: torch.dtype | None = None) -> Any:
    """Return the model on the CPU, in evaluation mode."""
    if not hasattr(transformers, tiny.model):
        pytest.skip(f"transformers {transformers.__version__} has no {tiny.model}")
    torch.manual_seed(0)
    config = getattr(transformers, tiny.config)(**tiny.fields)
    model = getattr(transformers, tiny.model)(config)
    stir(model)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped matmuls are for 32 bits and less
    return model.to(dtype or tiny.dtype).eval()


def stir(model: nn.Module) -> None:
    """Give weights at which logits are a few units large, and sinks beside them matter."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "sink" in name:
                parameter.uniform_(-2, 4)
            elif parameter.dim() > 1 and "bias" not in name:
                parameter.normal_(std=0.25)


def tokens(batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(kind: str) -> Tensor | None:
    """Return a mask `(3, LENGTH)` in which True is a token."""
    index = torch.arange(LENGTH)[None]
    left, right = torch.tensor([0, 3, 6])[:, None], torch.tensor([13, 12, 10])[:, None]
    match kind:
        case "none":
            return None
        case "left":
            return index >= left
        case "right":
            return index < right
        case "both":
            return (index >= left) & (index < right)
    holes = (index >= left) & (index != 8)
    holes[2, 10] = False
    return holes
