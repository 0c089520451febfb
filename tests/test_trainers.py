"""One step of the trainers that people use, through attn_n: Trainer, TRL's SFTTrainer, and LoRA by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_transformers import softmax_n_by_hand
from tests.tiny_models import DECODERS, LENGTH, VOCABULARY, make, padding, tokens

transformers = pytest.importorskip("transformers", "5.17")

from attn_n.integrations.transformers import get_softmax_n, register, set_softmax_n

SETTINGS: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "max_steps": 1, "report_to": [], "save_strategy": "no", "logging_steps": 1,
    "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
}  # fmt: skip
RATE = SETTINGS["learning_rate"]


def padded_examples() -> list[dict[str, Tensor]]:
    mask = padding("left")
    assert mask is not None
    return [
        {"input_ids": ids, "attention_mask": seen.long(), "labels": ids.masked_fill(~seen, -100)}
        for ids, seen in zip(tokens(), mask, strict=True)
    ]


def train(model: nn.Module, folder: Path, examples: list[dict[str, Tensor]], **settings: Any) -> dict[str, Any]:
    """Take one step, and return what the trainer logs of it."""
    arguments = transformers.TrainingArguments(str(folder), **SETTINGS | settings)
    trainer = transformers.Trainer(model, arguments, train_dataset=examples)
    trainer.train()
    return trainer.state.log_history[0]  # type: ignore[no-any-return]


def lora(model: nn.Module, *whole: str) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=list(whole) or None
    )
    torch.manual_seed(1)
    return get_peft_model(model, config)


WHOLE, ONE = {"per_device_train_batch_size": 3}, {"per_device_train_batch_size": 1}


@pytest.mark.parametrize(
    ("adapted", "settings"),
    [
        pytest.param(True, WHOLE, id="lora"),
        pytest.param(False, ONE | {"gradient_accumulation_steps": 3}, marks=pytest.mark.slow, id="accumulate"),
        pytest.param(False, WHOLE | {"gradient_checkpointing": True}, marks=pytest.mark.slow, id="checkpoint"),
    ],
)
def test_trainer(adapted: bool, settings: dict[str, Any], tmp_path: Path) -> None:
    """Loss, norm of the gradient and the model after the step are those of eager attention."""
    register()
    found = []
    for implementation in ("eager", "attn_n"):
        model = make(DECODERS["gpt_oss"], torch.float32)
        model.set_attn_implementation(implementation)
        model = lora(model) if adapted else model
        before = {name: x.detach().clone() for name, x in model.named_parameters()}
        log = train(model, tmp_path, padded_examples(), **settings)
        moved = {name: x.detach() - before[name] for name, x in model.named_parameters() if x.requires_grad}
        assert any(("lora" if adapted else "sinks") in name and x.abs().max() > 1e-3 for name, x in moved.items())
        found.append((log["loss"], log["grad_norm"], moved))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_learned_n_beside_lora(tmp_path: Path) -> None:
    """PEFT trains, saves and merges what `modules_to_save` names, also n."""
    from peft import PeftModel

    def made() -> Any:
        return set_softmax_n(make(DECODERS["llama"], torch.float32), 3.0, learnable=True)

    plain = make(DECODERS["llama"], torch.float32)
    plain.set_attn_implementation("eager")
    examples = [{"input_ids": ids, "labels": ids} for ids in tokens()]
    model = lora(made(), "softmax_n")
    logits = softmax_n_by_hand(lora(plain), torch.full((2, 4), 3.0))
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    log = train(model, tmp_path, examples, per_device_train_batch_size=3)
    assert log["loss"] == pytest.approx(float(loss), rel=1e-5)
    learned = torch.stack(list(get_softmax_n(model).values())).detach()
    assert float((learned - 3).abs().max()) > 1e-3
    out = model(tokens(), use_cache=False).logits
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(made(), tmp_path / "adapter")
    assert torch.allclose(again(tokens(), use_cache=False).logits, out, atol=1e-5)
    merged = again.merge_and_unload()
    assert torch.equal(torch.stack(list(get_softmax_n(merged).values())), learned)
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(loaded(tokens(), use_cache=False).logits, out, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
@pytest.mark.parametrize("implementation", ["attn_n", "flash_attn_n"])
def test_packed_by_trl(name: str, implementation: str, tmp_path: Path) -> None:
    """Loss and step of `SFTTrainer(packing=True)` are those of eager attention in each document by itself."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer

    register()
    documents = [ids[: 4 + i] for i, ids in enumerate(tokens(6))]
    truth, model = (make(DECODERS[name], torch.float32) for _ in range(2))
    truth.set_attn_implementation("eager")
    logits = torch.cat([truth(ids[None], use_cache=False).logits[0, :-1] for ids in documents])
    loss = nn.functional.cross_entropy(logits, torch.cat([ids[1:] for ids in documents]))
    loss.backward()

    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(VOCABULARY)}, unk_token="<0>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", eos_token="<0>")
    settings = SFTConfig(
        str(tmp_path),
        packing=True,
        max_length=LENGTH,
        per_device_train_batch_size=6,
        router_aux_loss_coef=0.0,
        **SETTINGS,
    )
    data = Dataset.from_list([{"input_ids": ids.tolist()} for ids in documents])
    model.set_attn_implementation(implementation)
    before = {key: x.detach().clone() for key, x in model.named_parameters()}
    trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
    assert len(trainer.train_dataset) < len(documents), "nothing is packed"
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for key, x in truth.named_parameters():
        if x.grad is not None:
            moved = (before[key] - dict(model.named_parameters())[key].detach()) / RATE
            torch.testing.assert_close(moved, x.grad, atol=1e-4, rtol=1e-3, msg=lambda text, of=key: f"{of}: {text}")
