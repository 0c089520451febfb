"""The examples, in a few steps."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from demo.model import GPT
from examples import serve, study
from examples.int8 import quantized, rounded


def test_rounded_to_255_numbers() -> None:
    x = torch.linspace(-3, 3, 10_001)
    found = rounded(x, torch.tensor(2.0))
    assert found.unique().numel() == 255
    within = x.abs() <= 2
    assert (found - x)[within].abs().max() <= 1.001 * 1 / 127
    assert found.abs().max() == 2.0
    assert torch.equal(rounded(torch.zeros(3), torch.zeros(())), torch.zeros(3))


def test_quantized_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    weights = [parameter.clone() for parameter in model.parameters()]
    calibration, x = torch.randn(20, 4), 3 * torch.randn(5, 4)
    found = quantized(model, calibration)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), weights, strict=True))
    hidden_largest = model[:2](calibration).abs().amax()
    first = rounded(x, calibration.abs().amax()) @ rounded(weights[0], weights[0].abs().amax()).T
    second = rounded(first.relu(), hidden_largest) @ rounded(weights[1], weights[1].abs().amax()).T + weights[2]
    torch.testing.assert_close(found(x), second)
    assert not torch.allclose(found(x), model(x), atol=1e-3)


def test_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    study.main(["--steps", "1", "--seeds", "3", "--every", "80", "--threads", "1", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    runs = json.loads((tmp_path / "study.json").read_text())["runs"]
    assert [(run["kind"], run["seed"]) for run in runs] == [("n = 0", 3), ("n = 1", 3), ("learned", 3)]
    for run in runs:
        assert all(math.isfinite(value) for name, value in run.items() if name != "kind")
        assert (run["to_nothing"] > 0) == (run["kind"] != "n = 0")
        assert run["loss"] != run["int8_loss"]
    assert runs[0]["loss"] != runs[1]["loss"] != runs[2]["loss"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["n", "=", "0", "3"]
    assert "learned against n = 0, what int8 adds to the loss: " in lines[-1]
    assert lines[-1].endswith("of 1 seeds")


def following(model: GPT, request: serve.Request) -> list[int]:
    """What follows greedily, each token by a pass over all those before it."""
    tokens = list(request.prompt)
    for _ in range(request.new):
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    return tokens[len(request.prompt) :]


@torch.no_grad()
def test_served_as_without_a_cache() -> None:
    torch.manual_seed(0)
    model = GPT(None, layers=2, heads=2, width=32).double()
    for block in model.blocks:
        block.attention.sinks.copy_(torch.tensor([3.0, -1.0]))
    server = serve.Server(model, blocks=7, block=4)
    # Of 3, 2, 3, 1 and 7 blocks.
    requests = [
        serve.Request(torch.randint(256, (a,)).tolist(), b) for a, b in ((5, 6), (3, 3), (4, 9), (1, 1), (9, 20))
    ]
    for request in requests[:3]:
        server.submit(request)
    done, running = [], []
    for step in range(60):
        if step == 3:
            for request in requests[3:]:
                server.submit(request)
        done += server.step()
        held = [block for request in server.running for block in request.blocks]
        assert sorted(held + server.free) == list(range(7))
        running.append(len(server.running))
        if len(done) == 5:
            break
    assert running[:4] == [2, 2, 1, 2]  # the third begins when the second has given its blocks back
    assert [requests.index(request) for request in done] == [1, 3, 0, 2, 4]
    found = [request.tokens for request in requests]
    assert found == [following(model, request) for request in requests]
    for block in model.blocks:
        block.attention.sinks.fill_(-math.inf)
    assert found != [following(model, request) for request in requests]
    with pytest.raises(ValueError, match="at most 7 blocks of 4 keys, got one of 8"):
        server.submit(serve.Request([1] * 9, 21))


def test_serve(capsys: pytest.CaptureFixture[str]) -> None:
    serve.main(["--steps", "1", "--requests", "3", "--block", "32"])
    lines = capsys.readouterr().out.splitlines()
    tokens = sum(int(re.search(r"\+ +(\d+) tokens", line)[1]) for line in lines[:3])
    assert len(lines) == 4
    assert lines[3].startswith(f"{tokens} tokens in ")


def test_gpt_oss_finetune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny model learns; saved, it is a checkpoint of which the attention alone is trained, in bfloat16."""
    transformers = pytest.importorskip("transformers", "5.17")
    from tokenizers import Tokenizer, models, pre_tokenizers

    from examples import gpt_oss_finetune

    made, tuned = tmp_path / "made", tmp_path / "tuned"
    gpt_oss_finetune.main(["--steps", "10", "--rows", "1", "--length", "64", "--out", str(made)])
    losses = [float(x) for x in re.findall(r"held-out loss (\S+)", capsys.readouterr().out)]
    assert losses[1] < losses[0] - 0.3
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("end", "a", "b", "c"))}, unk_token="end"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end").save_pretrained(made)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": "a b c " * length}) for length in range(1, 12)))
    arguments = ["--only", "self_attn", "--dtype", "bfloat16", "--steps", "1", "--length", "16", "--checkpointing"]
    gpt_oss_finetune.main(["--model", str(made), "--data", str(texts), *arguments, "--lr", "0.1", "--out", str(tuned)])
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(x, dtype=torch.bfloat16).state_dict() for x in (made, tuned)
    )
    moved = {name for name, x in before.items() if not torch.equal(x, after[name])}
    assert moved == {name for name in before if "self_attn" in name}
    assert any("sinks" in name for name in moved)
    assert transformers.AutoTokenizer.from_pretrained(tuned)("a b")["input_ids"] == [1, 2]


def test_packed_documents_are_apart() -> None:
    pytest.importorskip("transformers", "5.17")
    from examples import gpt_oss_finetune

    gpt_oss_finetune.register()
    torch.manual_seed(0)
    model, _ = gpt_oss_finetune.tiny()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.uniform_(-2, 4)
    options = SimpleNamespace(device="cpu", dtype="float32")
    documents = [torch.randint(256, (length,)).tolist() for length in (5, 9, 2)]
    rows = gpt_oss_finetune.packed(documents, 16)
    assert rows[1].tolist() == [[*range(5), *range(9), *range(2)]]
    assert rows[2, 0].tolist() == [x if i else -100 for document in documents for i, x in enumerate(document)]
    alone = [gpt_oss_finetune.loss_of(model, gpt_oss_finetune.packed([x], len(x))[:, 0], options) for x in documents]
    mean = sum(loss * (len(x) - 1) for loss, x in zip(alone, documents, strict=True)) / (16 - 3)
    torch.testing.assert_close(gpt_oss_finetune.loss_of(model, rows[:, 0], options), mean)
    assert gpt_oss_finetune.packed(documents, 8)[1].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1]]
