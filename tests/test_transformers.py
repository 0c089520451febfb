"""attn_n in models of transformers, against their eager attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.oracle import attention_n
from tests.tiny_models import DECODERS, ENCODERS, LENGTH, VOCABULARY, Tiny, make, padding, stir, tokens

transformers = pytest.importorskip("transformers", "5.17")

from transformers import masking_utils

from attn_n import UnsupportedError, flash_attention_n, flash_attention_n_varlen
from attn_n.integrations.transformers import attention as adapter
from attn_n.integrations.transformers import get_softmax_n, paged, register, set_softmax_n, strip_softmax_n
from attn_n.integrations.transformers.masks import attention_mask
from attn_n.integrations.transformers.pattern import MaskPattern

slow = pytest.mark.slow
KINDS = ("none", "left", "right", "both", "holes")


@pytest.fixture(autouse=True)
def exact_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register, and let eager attention in float64 be float64: models ask softmax for float32."""
    register()
    softmax = nn.functional.softmax

    def exact(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim, _stacklevel, None if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(nn.functional, "softmax", exact)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of each call of ours that the adapter makes, with `varlen`."""
    made: list[dict[str, Any]] = []
    for function in (flash_attention_n, flash_attention_n_varlen):

        def noted(*args: Any, _function: Callable[..., Any] = function, **kwargs: Any) -> Any:
            made.append({**kwargs, "varlen": _function is flash_attention_n_varlen, "q": args[0], "k": args[1]})
            return _function(*args, **kwargs)

        monkeypatch.setattr(adapter, function.__name__, noted)
    return made


def run(model: Any, implementation: str, mask: Tensor | None, **inputs: Any) -> dict[str, Tensor]:
    """Return what the model puts out for real tokens, and the gradients of all its parameters."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    out = model(tokens(), attention_mask=None if mask is None else mask.long(), **inputs)[0]
    seen = out if mask is None else out[mask]
    (seen * torch.linspace(-1, 1, seen.numel(), dtype=seen.dtype).view_as(seen)).sum().backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {"out": seen.detach(), **gradients}


def assert_close(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == truth.keys()
    for name, x in truth.items():
        bound = tolerance * max(float(x.abs().max()), 1e-3)
        assert float((found[name] - x).abs().max()) <= bound, name


def cases(models: dict[str, Tiny], *fast: str) -> list[Any]:
    return [
        pytest.param(name, kind, marks=() if f"{name} {kind}" in fast else slow) for name in models for kind in KINDS
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    cases(
        DECODERS, *(f"gpt_oss {kind}" for kind in KINDS), "mimo_v2_flash left", "gemma2 none", "llama4 left",
        "deepseek_v4 left", "hy_v4 left",
    ),
)  # fmt: skip
def test_decoders(name: str, kind: str, calls: list[dict[str, Any]]) -> None:
    """Eager computes parts in float32 even here, so that errors up to its rounding are its own."""
    model, mask = make(DECODERS[name]), padding(kind)
    truth = run(model, "eager", mask, use_cache=False)
    found = run(model, "attn_n", mask, use_cache=False)
    assert_close(found, truth, DECODERS[name].tolerance)
    assert len(calls) >= model.config.num_hidden_layers
    if DECODERS[name].sinks:
        assert any(call["sinks"] is not None for call in calls)
        assert any("sink" in parameter for parameter in truth)
    if not DECODERS[name].dense:
        masks = [call["attn_mask"] for call in calls]
        assert all(x is None or x.shape[2] == 1 for x in masks), "a mask of L x S"
        assert kind == "holes" or masks == [None] * len(calls)


@pytest.mark.parametrize(("name", "kind"), cases(ENCODERS, "bert right", "openai_privacy_filter right"))
def test_encoders(name: str, kind: str, calls: list[dict[str, Any]]) -> None:
    model, mask = make(ENCODERS[name]), padding(kind)
    assert_close(run(model, "attn_n", mask), run(model, "eager", mask), 1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x == "gpt_oss" else slow) for x in DECODERS if DECODERS[x].dtype == torch.float64],
)
def test_float32(name: str) -> None:
    """The error is at most twice that of eager attention, plus rounding."""
    truth, eager, found = (
        run(make(DECODERS[name], dtype), implementation, padding("left"), use_cache=False)
        for dtype, implementation in (
            (torch.float64, "eager"), (torch.float32, "eager"), (torch.float32, "attn_n"),
        )
    )  # fmt: skip
    for key, x in truth.items():
        error, allowed = ((y[key].double() - x).abs().max() / x.abs().max().clamp_min(1e-3) for y in (found, eager))
        assert float(error) <= 2 * float(allowed) + 10 * DECODERS[name].tolerance, key


# The ways to decode: keywords of generate.
WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "without cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "static beams": {"num_beams": 2, "cache_implementation": "static"},
    "prompt in parts": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=() if (name, way) in {("gpt_oss", "dynamic"), ("gpt_oss", "static")} else slow)
        for name in DECODERS if name not in ("deepseek_v4", "inkling2") for way in WAYS
    ],
)  # fmt: skip
def test_generate(name: str, way: str, calls: list[dict[str, Any]]) -> None:
    """Token for token, with padding on the left, beyond the window."""
    if name == "llama4" and "static" in way and transformers.__version__ < "5.18":
        pytest.skip("transformers 5.17 cannot: create_chunked_causal_mask() got an unexpected keyword argument")
    model, mask = make(DECODERS[name]), padding("left")
    found = []
    for implementation in ("eager", "attn_n"):
        model.set_attn_implementation(implementation)
        keywords = {"max_new_tokens": 8, "do_sample": False, **WAYS[way]}
        found.append(model.generate(tokens(), attention_mask=mask.long(), **keywords))
    assert found[0].shape[1] == LENGTH + 8
    assert torch.equal(*found)
    steps = 10 if way == "prompt in parts" else 8
    assert len(calls) == steps * model.config.num_hidden_layers
    if not DECODERS[name].dense:
        assert all(call["attn_mask"] is None for call in calls)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_cache(cache: str) -> None:
    """Keys and values of other layers are in the host's memory meanwhile."""
    model, mask, found = make(DECODERS["gpt_oss"]).cuda(), padding("left"), []
    for implementation in ("eager", "attn_n"):
        model.set_attn_implementation(implementation)
        keywords = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
        found.append(model.generate(tokens().cuda(), attention_mask=mask.long().cuda(), **keywords))
    assert torch.equal(*found)


@slow
@pytest.mark.parametrize("assistant", ["model", "prompt"])
def test_assisted_decoding(assistant: str) -> None:
    model, found = make(DECODERS["gpt_oss"]), []
    for implementation in ("eager", "attn_n"):
        model.set_attn_implementation(implementation)
        keywords: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
        if assistant == "model":
            small = make(DECODERS["gpt_oss"]._replace(fields=DECODERS["gpt_oss"].fields | {"num_hidden_layers": 1}))
            small.set_attn_implementation(implementation)
            keywords = {"assistant_model": small}
        found.append(model.generate(tokens(1), max_new_tokens=10, do_sample=False, **keywords))
    assert torch.equal(*found)


PARTS = [5, 6, 2]


@pytest.mark.parametrize("name", ["gpt_oss", pytest.param("llama", marks=slow), pytest.param("gemma3", marks=slow)])
@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "both"])
def test_packed_sequences(name: str, how: str, calls: list[dict[str, Any]]) -> None:
    """Each sequence is as by itself. (Eager gpt-oss does not look at positions: its sequences see each other.)"""
    model, ids = make(DECODERS[name]), tokens(1)
    model.set_attn_implementation("attn_n")
    truth = torch.cat([model(x, use_cache=False).logits for x in ids.split(PARTS, 1)], 1)
    positions = torch.cat([torch.arange(x) for x in PARTS])[None]
    starts = torch.tensor([0, 5, 11, 13], dtype=torch.int32)
    given: dict[str, Any] = {"position_ids": positions}  # rotary embedding needs them in any case
    if how != "position_ids":
        given |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 6, "max_length_k": 6}
    calls.clear()
    out = model(ids, use_cache=False, **given).logits
    assert torch.allclose(out, truth, atol=1e-5)
    assert all(call["varlen"] and call["attn_mask"] is None for call in calls if "attn_mask" in call)
    assert len(calls) == 2
    if how == "position_ids":
        model.set_attn_implementation("eager")
        leaks = not torch.allclose(model(ids, use_cache=False, **given).logits, truth, atol=1e-3)
        assert leaks == (name == "gpt_oss")


def test_eager_has_nan_where_ours_has_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's eager attention casts float64's lowest number to float32, so that rows that see no key are NaN."""
    monkeypatch.undo()
    model, mask = make(DECODERS["llama"]), padding("left")
    for implementation, finite in (("eager", False), ("attn_n", True)):
        model.set_attn_implementation(implementation)
        assert bool(model(tokens(), attention_mask=mask.long()).logits.isfinite().all()) == finite


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = make(DECODERS["gpt_oss"]).train()
    truth = run(model, "attn_n", padding("left"), use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(run(model, "attn_n", padding("left"), use_cache=False), truth, 1e-7)


@slow
@pytest.mark.parametrize(("kind", "backend"), [("none", "aot_eager"), ("left", "aot_eager"), ("left", "inductor")])
def test_torch_compile(kind: str, backend: str) -> None:
    """A step in one graph. Of gpt-oss's experts `batched_mm` compiles; the loop of `eager` breaks the graph."""
    model, mask = make(DECODERS["gpt_oss"], torch.float32), padding(kind)
    model.set_experts_implementation("batched_mm")
    truth = run(model, "attn_n", mask, use_cache=False)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    assert_close(run(model, "attn_n", mask, use_cache=False), truth, 1e-3)


@slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_packed_sequences_when_compiled(backend: str) -> None:
    """Compiled code cannot look at positions. What it may not ignore is an error, and lengths are the remedy."""

    def attend(x: Tensor, positions: Tensor, padded: Tensor | None, starts: Tensor | None) -> Tensor:
        mask = attention_mask(1, LENGTH, LENGTH, attention_mask=padded)
        lengths = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts)
        return adapter.attention(module, x, x, x, mask, position_ids=positions, **lengths)[0]

    module, x = nn.Module(), torch.randn(1, 2, LENGTH, 8, requires_grad=True)
    packed = torch.cat([torch.arange(n) for n in PARTS])[None]
    starts = torch.tensor([0, 5, 11, 13], dtype=torch.int32)
    behind = torch.arange(LENGTH)[None] >= 4
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    in_order = torch.arange(LENGTH)[None]
    for given in ((in_order, None, None), (packed, None, starts), ((in_order - 4).clamp_min(0), behind, None)):
        assert torch.allclose(compiled(x, *given), attend(x, *given), atol=1e-5)
    for padded in (None, torch.ones(1, LENGTH, dtype=torch.bool)):
        with pytest.raises(RuntimeError, match="cannot look for packed sequences in compiled code"):
            compiled(x, packed, padded, None)


@slow
def test_compiled_decoding() -> None:
    """A static cache and its masks enter the compiled step, which serves every length."""
    model = make(DECODERS["gpt_oss"], torch.float32)
    model.set_experts_implementation("batched_mm")
    model.set_attn_implementation("attn_n")
    keywords = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    truth = model.generate(tokens(), attention_mask=padding("left").long(), **keywords)
    torch._dynamo.reset()
    model._valid_auto_compile_criteria = lambda *args, **kwargs: True  # on an accelerator alone, by itself
    compiled = transformers.CompileConfig(backend="eager", fullgraph=True, mode=None)
    found = model.generate(tokens(), attention_mask=padding("left").long(), compile_config=compiled, **keywords)
    assert torch.equal(found, truth)


def seq2seq(name: str) -> tuple[Any, dict[str, Any]]:
    small = {"vocab_size": VOCABULARY, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 0}
    if name == "t5":
        config = transformers.T5Config(d_kv=8, d_ff=24, num_layers=2, num_heads=4, **small)
        model = transformers.T5ForConditionalGeneration(config)
        return model, {"input_ids": tokens(), "attention_mask": padding("right").long()}
    sizes = {f"{x}_{y}": 4 for x in ("encoder", "decoder") for y in ("attention_heads", "ffn_dim")}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8, "max_source_positions": 10}
    config = transformers.WhisperConfig(
        **small, **sizes, **layers, max_target_positions=20, bos_token_id=1, eos_token_id=2
    )
    return transformers.WhisperForConditionalGeneration(config), {"input_features": torch.randn(3, 8, 20).double()}


@pytest.mark.parametrize("name", ["t5", pytest.param("whisper", marks=slow)])
def test_encoder_and_decoder(name: str) -> None:
    """Cross attention, and T5's learned position bias with its gradient."""
    model, inputs = seq2seq(name)
    stir(model)
    model.double().eval()
    results, generated = [], []
    for implementation in ("eager", "attn_n"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        out = model(**inputs, decoder_input_ids=tokens()[:, :7]).logits
        out.sin().sum().backward()
        gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
        results.append({"out": out.detach(), **gradients})
        generated.append(model.generate(**inputs, max_new_tokens=5, do_sample=False))
    assert_close(results[1], results[0], 1e-5)
    assert name != "t5" or any("relative_attention_bias" in x for x in results[0])
    assert torch.equal(*generated)


@slow
def test_images() -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=16, patch_size=4
    )
    model = transformers.ViTModel(config).double().eval()
    stir(model)
    found = []
    for implementation in ("eager", "attn_n"):
        model.set_attn_implementation(implementation)
        found.append(model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double())[0])
    assert torch.allclose(*found, atol=1e-10)


@slow
def test_images_and_text() -> None:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        text_config=DECODERS["llama"].fields | {"rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 24, "num_heads": 4, "out_hidden_size": 32,
            "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
        },
        image_token_id=60, video_token_id=59, vision_start_token_id=58,
    )  # fmt: skip
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).double().eval()
    stir(model)
    ids = tokens().clamp_max(50)
    ids[:, 2:6] = 60
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(48, 96).double(),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 3),
        "mm_token_type_ids": (ids == 60).long(),
    }
    found = []
    for implementation in ("eager", "attn_n", "flash_attn_n"):
        model.set_attn_implementation(implementation)
        found.append(model(**inputs).logits)
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert torch.allclose(found[0], found[2], atol=1e-6)


def test_flash_name() -> None:
    """Models with sinks replace names of flash implementations that they do not list: ours is listed."""
    model = make(DECODERS["gpt_oss"])
    model.set_attn_implementation("flash_attn_n")
    assert model.config._attn_implementation == "flash_attn_n"
    truth = run(model, "eager", padding("left"), use_cache=False)
    assert_close(run(model, "flash_attn_n", padding("left"), use_cache=False), truth, 1e-5)


# --- the mask function by itself

FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "window of both sides": masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 2, 5])),
}
# (queries, keys, q_offset, kv_offset): a prompt, a step, a part of a prompt, a static cache, one with a tensor.
PLACES: list[tuple[int, int, Any, int]] = [
    (9, 9, 0, 0), (1, 9, 8, 0), (4, 9, 5, 0), (4, 5, 6, 5), (9, 12, 0, 0), (1, 12, 5, 0), (4, 12, torch.tensor(5), 0),
    (1, 12, torch.tensor(5), 0),
]  # fmt: skip


def hidden(kind: str, seen: int) -> Tensor | None:
    index = torch.arange(seen)[None]
    left, right = torch.tensor([0, 2, 5])[:, None], torch.tensor([seen, seen - 1, seen - 2])[:, None]
    masks = {"left": index >= left, "right": index < right, "both": (index >= left) & (index < right)}
    masks["holes"] = (index >= left) & (index != seen - 2)
    return masks.get(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_masks(function: str, kind: str, calls: list[dict[str, Any]]) -> None:
    """What the adapter computes by lengths and windows is what it computes by transformers' dense mask."""
    for place in PLACES:
        len_q, len_k, q_offset, kv_offset = place
        left = torch.zeros(3, dtype=torch.long) if kind in ("none", "right") else torch.tensor([0, 2, 5])
        mask_function = FUNCTIONS[function]
        if function == "chunks":
            mask_function = masking_utils.chunked_causal_mask_function(4, left)
        padded = hidden(kind, int(q_offset) + len_q)
        mask = attention_mask(3, len_q, len_k, q_offset, kv_offset, mask_function, padded)
        dense = mask.dense()
        assert dense.shape == mask.shape == (3, 1, len_q, len_k)
        q, k, v = torch.randn(3, 4, len_q, 8), torch.randn(3, 2, len_k, 8), torch.randn(3, 2, len_k, 8)
        sinks = torch.tensor([0.0, 2.0, -1.0, 4.0])
        out, _ = adapter.attention(nn.Module(), q, k, v, mask, s_aux=sinks)
        truth = flash_attention_n(q, k, v, sinks=sinks, attn_mask=dense).transpose(1, 2)
        real = torch.ones(3, len_q, dtype=torch.bool)
        if padded is not None:
            real = padded[:, int(q_offset) : int(q_offset) + len_q]
        assert torch.allclose(out[real], truth[real], atol=1e-5), place
        if function in ("causal", "bidirectional", "window"):
            call = calls[-1]
            assert call["attn_mask"] is None or (kind == "holes" and call["attn_mask"].shape[2] == 1), place


def test_a_mask_takes_no_memory() -> None:
    mask = attention_mask(2, 64, 64, mask_function=FUNCTIONS["window"])
    with torch._C.DisableTorchFunctionSubclass():
        nbytes = mask.untyped_storage().nbytes()
    assert nbytes == 1
    for kept in (mask.to("cpu"), mask.detach(), mask.contiguous()):
        assert isinstance(kept, MaskPattern)
    part = mask[:, :, :7, :5]
    assert not isinstance(part, MaskPattern)
    keywords = {"mask_function": FUNCTIONS["window"], "allow_is_causal_skip": False}
    assert torch.equal(part, masking_utils.sdpa_mask(2, 7, 5, **keywords))


def test_unknown_masks_are_dense() -> None:
    """As of images, whose tokens see each other."""
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1, -1]])
    function = masking_utils.or_masks(FUNCTIONS["window"], masking_utils.blockwise_overlay(blocks))
    mask = attention_mask(1, 7, 7, mask_function=function)
    assert mask.visible is None
    assert mask.dense()[0, 0, 1].tolist() == [True, True, True, True, False, False, False]


# --- what is refused


def some(len_q: int = 3, len_k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, 2, len_q, 8), torch.randn(1, 2, len_k, 8), torch.randn(1, 2, len_k, 8)


def test_what_is_refused() -> None:
    module = nn.Module()
    with pytest.raises(TypeError, match=r"does not know the argument\(s\) block_indices of Module"):
        adapter.attention(module, *some(), None, block_indices=torch.zeros(1))
    adapter.attention(module, *some(), None, block_indices=None, position_ids=torch.zeros(1))
    with pytest.raises(TypeError, match="does not know the argument"):
        attention_mask(1, 3, 3, new_rule=3)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        adapter.attention(module, *some(), None, output_attentions=True)
    with pytest.raises(UnsupportedError, match="expected a mask for 3 causal queries of 5 keys"):
        adapter.attention(module, *some(3, 5), None)
    with pytest.raises(ValueError, match="expected one for 3 queries and 5 keys, got one for 3 and 4"):
        adapter.attention(module, *some(3, 5), attention_mask(1, 3, 4))
    with pytest.raises(ValueError, match="expected one of s_aux, sinks"):
        adapter.attention(module, *some(), None, s_aux=torch.zeros(2), sinks=torch.zeros(1, 2, 3, 1))
    with pytest.raises(ValueError, match=r"expected a mask \(N, 1, L, S\) together with indices"):
        adapter.attention(module, *some(), None, indices=torch.zeros(1, 3, 1, dtype=torch.int32))
    starts = torch.tensor([0, 3])
    with pytest.raises(ValueError, match="expected None together with cu_seq_lens_q"):
        adapter.attention(module, *some(), torch.ones(1, 1, 3, 3, dtype=torch.bool), cu_seq_lens_q=starts)
    with pytest.raises(TypeError, match="expected a tensor"):
        adapter.attention(module, *some(), torch.zeros(3, 3, 3))
    with pytest.raises(ValueError, match="name: expected a name without"):
        register("a/b")


def test_output_attentions_of_a_model() -> None:
    model = make(DECODERS["gpt_oss"])
    model.set_attn_implementation("attn_n")
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(tokens(), output_attentions=True)


@pytest.mark.parametrize("shape", ["head", "token"])
def test_sinks_and_bias(shape: str) -> None:
    """With gradients, and sinks of each token as Inkling2 has them: `(N, Hq, L, 1)`."""
    q, k, v = (x.double().requires_grad_() for x in some(4, 4))
    sinks = torch.randn((2,) if shape == "head" else (1, 2, 4, 1), dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    mask = attention_mask(1, 4, 4)
    out, weights = adapter.attention(
        nn.Module(), q, k, v, mask, position_bias=bias, **{"s_aux" if shape == "head" else "sinks": sinks}
    )
    assert weights is None
    logits = (q @ k.mT / 8**0.5 + bias).masked_fill(~mask.dense(), -torch.inf)
    column = (sinks.view(1, 2, 1, 1) if shape == "head" else sinks).expand(1, 2, 4, 1)
    truth = (torch.cat([logits, column], -1).softmax(-1)[..., :-1] @ v).transpose(1, 2)
    assert torch.allclose(out, truth)
    tensors = (q, k, v, sinks, bias)
    for one, two in zip(*(torch.autograd.grad(x.sin().sum(), tensors) for x in (out, truth)), strict=True):
        assert torch.allclose(one, two, atol=1e-8)


# --- continuous batching


@pytest.mark.parametrize("release", ["5.17", "5.24"])
@pytest.mark.parametrize("window", [None, 4])
def test_block_table(release: str, window: int | None) -> None:
    """A decoding step over a paged cache, as each release hands it over: new keys are written, then seen."""
    lengths, block, sinks = (6, 11), 4, torch.tensor([0.0, 2.0, -1.0, 4.0])
    past = [torch.randn(2, 2, 12, 8) for _ in "kv"]  # (sequences, Hkv, most keys, E)
    pages = torch.full((2, 9, block, 2, 8), torch.nan)
    table = torch.tensor([[7, 2, -1], [0, 5, 3]], dtype=torch.int32)
    for b, length in enumerate(lengths):
        for i in range(length):
            for x, one in zip(pages, past, strict=True):
                x[table[b, i // block], i % block] = one[b, :, i]
    q, k, v = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8)
    starts = torch.tensor([0, 7, 19], dtype=torch.int32)  # with the new key
    module = nn.Module()
    module.layer_idx, module.sliding_window = 3, window
    given: dict[str, Any] = {"block_table": table, "k_cache": pages[0], "v_cache": pages[1], "cu_seq_lens_k": starts}
    if release == "5.17":
        cache = SimpleNamespace(
            layer_index_to_group_indices={3: (1, 0)}, block_size=block, num_key_value_heads=2, head_dim=8,
            key_cache=[pages[0].view(-1, 2, 8)], value_cache=[pages[1].view(-1, 2, 8)],
        )  # fmt: skip
        kinds = {"full_attention": starts, "sliding_attention": starts} if window else starts
        given = {"block_table": torch.stack([table * 0, table]), "cache": cache, "cu_seq_lens_k": kinds}
    starts_q = torch.tensor([0, 1, 2])
    out, _ = adapter.attention(module, q, k, v, s_aux=sinks, cu_seq_lens_q=starts_q, max_length_q=1, **given)
    assert out.shape == (1, 2, 4, 8)
    for b, length in enumerate(lengths):
        keys, values = (
            torch.cat([x[b, :, :length], new[0, :, b : b + 1]], 1)[None] for x, new in zip(past, (k, v), strict=True)
        )
        left = None if window is None else window - 1
        truth, _ = attention_n(q[:, :, b : b + 1], keys, values, sinks=sinks, window=(left, None), causal=True)
        assert torch.allclose(out[:, b], truth[:, :, 0], atol=1e-5)
        assert torch.equal(pages[0][table[b, length // block], length % block], k[0, :, b])
    with pytest.raises(TypeError, match=r"does not know the argument\(s\) tree"):
        adapter.attention(module, q, k, v, cu_seq_lens_q=starts_q, tree=q, **given)


@slow
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_continuous_batching(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate_batch` gives each request what it gets by itself; gpt-oss keeps its sinks and windows."""
    model, served = make(DECODERS[name], torch.float32), []
    requests = [row[: 5 + 4 * i] for i, row in enumerate(tokens())]
    model.set_attn_implementation("eager")
    truth = [model.generate(x[None], max_new_tokens=6, do_sample=False)[0, len(x) :].tolist() for x in requests]
    original = paged.attention
    monkeypatch.setattr(paged, "attention", lambda *args: served.append(args) or original(*args))
    model.set_attn_implementation("flash_attn_n")
    config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(inputs=[x.tolist() for x in requests], generation_config=config)
    assert [x.generated_tokens for x in found.values()] == truth
    assert len(served) >= 6 * 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_waits_for_the_gpu(kind: str) -> None:
    """The mask function may read the padding, once; the layers read nothing."""
    hidden_keys = hidden(kind, 9)
    padded = None if hidden_keys is None else hidden_keys.cuda()
    q, k, v = (torch.randn(3, 4, 9, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    sinks = torch.zeros(4, device="cuda", requires_grad=True)
    for function in ("causal", "window"):
        mask = attention_mask(3, 9, 9, mask_function=FUNCTIONS[function], attention_mask=padded, device="cuda")
        for mode in ("default", "error"):  # the first call compiles
            torch.cuda.set_sync_debug_mode(mode)
            try:
                out, _ = adapter.attention(nn.Module(), q, k, v, mask, s_aux=sinks)
                torch.autograd.grad(out.sum(), (q, k, v, sinks))
            finally:
                torch.cuda.set_sync_debug_mode("default")


# --- softmax_n in models


def softmax_n_by_hand(model: Any, n: Tensor) -> Tensor:
    """Return the model's logits with a column of log n in eager attention, n `(layers, Hq)`."""
    softmax, layer = nn.functional.softmax, itertools.count()

    def with_n(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        column = n[next(layer)].log().view(1, -1, 1, 1).expand(*x.shape[:-1], 1).to(x.dtype)
        return softmax(torch.cat([x, column], -1), dim)[..., :-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", with_n)
        return model(tokens(), use_cache=False).logits


@pytest.mark.parametrize("learnable", [False, True])
def test_set_softmax_n(learnable: bool, tmp_path: Any) -> None:
    model = make(DECODERS["llama"])
    model.set_attn_implementation("eager")
    plain = model(tokens(), use_cache=False).logits
    n = torch.tensor([[1.0, 2.0, 5.0, 0.5], [3.0, 3.0, 3.0, 3.0]])
    truth = softmax_n_by_hand(model, n)
    assert set_softmax_n(model, {0: n[0], "model.layers.1.self_attn": 3.0}, learnable=learnable) is model
    out = model(tokens(), use_cache=False).logits
    assert torch.allclose(out, truth, atol=1e-5)
    assert not torch.allclose(out, plain, atol=1e-2)
    assert torch.allclose(torch.stack(list(get_softmax_n(model).values())).float(), n)

    parameters = dict(model.named_parameters())
    assert ("model.layers.0.self_attn.softmax_n.log_n" in parameters) == learnable
    if learnable:
        out.sum().backward()
        assert parameters["model.layers.1.self_attn.softmax_n.log_n"].grad.abs().min() > 0
        with torch.no_grad():
            parameters["model.layers.0.self_attn.softmax_n.log_n"].add_(1)
        out = model(tokens(), use_cache=False).logits

    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.allclose(again(tokens(), use_cache=False).logits, out, atol=1e-9)
    half = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[0].self_attn.softmax_n.log_n.dtype == (torch.bfloat16 if learnable else torch.float32)
    inner = transformers.LlamaModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert len(get_softmax_n(inner)) == 2

    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with pytest.raises(ValueError, match="expected attn_n, because this model has softmax_n"):
            model(tokens())
    strip_softmax_n(model)
    assert torch.allclose(model(tokens(), use_cache=False).logits, plain, atol=1e-5)
    assert not get_softmax_n(model)
    assert not hasattr(model.config, "softmax_n")


def test_what_set_softmax_n_refuses() -> None:
    with pytest.raises(ValueError, match="has sinks of its own"):
        set_softmax_n(make(DECODERS["gpt_oss"]), 1.0)
    model = make(DECODERS["llama"])
    for n, learnable, message in (
        (-1.0, False, "expected finite numbers >= 0"),
        (0.0, True, "expected finite numbers greater than 0"),
        (torch.ones(3), False, r"expected a number or a tensor \(4,\)"),
        ({7: 1.0}, False, "expected the names or the layer_idx"),
    ):
        with pytest.raises(ValueError, match=message):
            set_softmax_n(model, n, learnable=learnable)
    assert not get_softmax_n(model)
    set_softmax_n(model, 0.0)
    model.set_attn_implementation("attn_n")
    assert model(tokens()).logits.isfinite().all()
