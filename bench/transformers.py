"""Measures a small gpt-oss in transformers: python -m bench.transformers OUT.json, on a GPU.

Eight layers with sinks, every other one with a window of 128 tokens, in one process: a training step at each length and
`generate`, with attn_n and with the other attention implementations that run here. Each is first compared with eager
attention in float32; of one that is further off than twice eager in the same dtype the results say so. Implementations
take turns, and medians are reported. `--quick` does it at a tiny size, on a CPU too, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from attn_n.integrations.transformers import register
from bench.method.machine import commit, machine

IMPLEMENTATIONS = (
    "attn_n", "eager", "flex_attention", "flash_attention_4", "flash_attention_3", "flash_attention_2",
    "kernels-community/vllm-flash-attn3",
)  # fmt: skip


class Size(NamedTuple):
    hidden: int
    heads: int
    kv_heads: int
    experts: int
    vocabulary: int
    lengths: tuple[int, ...]  # of training steps
    prompts: tuple[int, int]  # how many, and their length
    new: int
    rounds: int


FULL = Size(1024, 32, 4, 8, 8192, (1024, 4096, 16384), (8, 2000), 64, 7)
QUICK = Size(64, 4, 2, 4, 128, (32, 64), (2, 40), 4, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--quick", action="store_true", help="a tiny size, to see that it works")
    args = parser.parse_args()
    register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = QUICK if args.quick else FULL
    model = small_gpt_oss(size, device)
    found: dict[str, Any] = {
        "machine": machine(device) | {"transformers": transformers.__version__},
        "commit": commit(),
        "size": size._asdict(),
        "refused": {},
        "error over the allowed": {},
        "lines": [],
    }
    served = [name for name in IMPLEMENTATIONS if _serves(model, name, found)]
    for length in size.lengths:
        ids = torch.randint(size.vocabulary, (1, length), device=device)
        _measure(
            found, model, served, f"training step, {length} tokens", lambda ids=ids: _step(model, ids), size, args.out
        )
    prompts = torch.randint(1, size.vocabulary, size.prompts, device=device)
    what = f"generate, {size.prompts[0]} prompts of {size.prompts[1]} tokens, {size.new} new"
    _measure(found, model, served, what, lambda: _generate(model, prompts, size.new), size, args.out)


def small_gpt_oss(size: Size, device: str) -> Any:
    """Return the model in bfloat16, with sinks that matter."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        num_hidden_layers=8, hidden_size=size.hidden, intermediate_size=size.hidden, head_dim=64,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, num_local_experts=size.experts,
        num_experts_per_tok=2, vocab_size=size.vocabulary, sliding_window=128, max_position_embeddings=131072,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).to(device=device, dtype=torch.bfloat16)
    for layer in model.model.layers:
        torch.nn.init.uniform_(layer.self_attn.sinks, -2, 4)
    return model


def _serves(model: Any, name: str, found: dict[str, Any]) -> bool:
    """Return whether an implementation runs, and note its error, or the reason why it does not run."""
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ValueError(f"transformers takes {model.config._attn_implementation} instead")
        found["error over the allowed"][name] = round(_excess(model, name), 2)
    except Exception as error:
        found["refused"][name] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        print(f"{name}: {found['refused'][name]}", flush=True)
        return False
    print(f"{name}: {found['error over the allowed'][name]} of the error allowed", flush=True)
    return True


def _excess(model: Any, name: str) -> float:
    """Return the error of attention with sinks, over twice that of eager attention in bfloat16.

    Attention alone, of one layer, because the router of a mixture of experts magnifies rounding.
    """
    layer = model.model.layers[0].self_attn
    ids = torch.randint(1, model.config.vocab_size, (1, 200), device=model.device)
    positions = torch.arange(200, device=model.device)[None]

    def attend(implementation: str, dtype: torch.dtype) -> dict[str, Tensor]:
        model.to(dtype).set_attn_implementation(implementation)
        model.zero_grad()
        x = model.model.embed_tokens(ids)
        mask = transformers.masking_utils.create_sliding_window_causal_mask(model.config, x, None, None)
        out, _ = layer(x * 30, position_embeddings=model.model.rotary_emb(x, positions), attention_mask=mask)
        out.float().sin().sum().backward()
        return {"out": out.detach(), **{name: p.grad for name, p in layer.named_parameters()}}

    kept = {key: x.clone() for key, x in model.state_dict().items()}
    truth = {key: x.clone() for key, x in attend("eager", torch.float32).items()}
    eager = {key: x.clone() for key, x in attend("eager", torch.bfloat16).items()}
    mine = attend(name, torch.bfloat16)
    model.load_state_dict(kept)

    def error(x: dict[str, Tensor], key: str) -> float:
        return float((x[key].float() - truth[key]).norm() / truth[key].norm())

    return max(error(mine, key) / (2 * error(eager, key) + 1e-3) for key in truth)


def _measure(
    found: dict[str, Any], model: Any, names: list[str], what: str, run: Callable[[], object], size: Size, out: str
) -> None:
    """Add the median of each implementation, and write all of it."""
    times: dict[str, list[float]] = {}
    reasons, peaks = {}, {}
    for name in names:  # the first run compiles
        model.set_attn_implementation(name)
        _forget_peak()
        try:
            run()
            run()
        except torch.OutOfMemoryError:
            reasons[name] = "out of memory"
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        else:
            times[name], peaks[name] = [], _peak()
        model.zero_grad()
    order = list(times)
    for _ in range(size.rounds):
        random.shuffle(order)
        for name in order:
            model.set_attn_implementation(name)
            times[name].append(_seconds(run))
    for name in names:
        line = {"what": what, "implementation": name}
        if name in times:
            line |= {"ms": round(1e3 * statistics.median(times[name]), 3), "peak_MiB": peaks[name]}
        else:
            line |= {"reason": reasons[name]}
        found["lines"].append(line)
        print(json.dumps(line), flush=True)
    with open(out, "w") as file:
        json.dump(found, file, indent=1)


def _step(model: Any, ids: Tensor) -> None:
    model.train()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()


def _generate(model: Any, prompts: Tensor, new: int) -> None:
    model.eval()
    model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )


def _seconds(run: Callable[[], object]) -> float:
    _wait()
    begin = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - begin


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int | None:
    return torch.cuda.max_memory_allocated() >> 20 if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
