"""The host's decisions for the Hopper kernels: which calls they serve, their tiles and their teams."""

from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from attn_n.backends import triton as triton_backend
from attn_n.backends.base import dense_strides
from attn_n.backends.triton import BACKEND, hopper
from attn_n.backends.triton.hopper import HopperKernels, configs
from attn_n.backends.triton.kernel_key import describe
from attn_n.call import Options
from attn_n.dispatch import choose, explanation
from tests.calls import gpu_call, varlen

WIDTHS = (64, 128, 256)


# Of one sequence of 16,384 tokens with two KV heads, on 132 SMs.
@pytest.mark.parametrize(
    ("changes", "groups", "heads"),
    [
        ({}, 8, 8),
        ({"right": 0}, 1, 1),
        ({"right": 0}, 4, 4),
        ({"right": 0}, 8, 2),
        ({"right": 0}, 6, 2),
        ({"right": 0}, 7, 1),
        ({"right": 0, "width": 64}, 8, 8),
        ({"right": 0, "width": 64}, 16, 4),
        ({"right": 0, "width": 256}, 4, 2),
        ({"right": 0, "left": 500}, 8, 8),
        ({"right": 0, "left": 4000}, 8, 2),
        ({"right": 0, "varlen": True, "batch": 64, "len_q": 300}, 8, 8),
        ({"right": 0, "varlen": True, "batch": 64, "len_q": 3000}, 8, 2),
        ({"heads_kv": 1, "keys": 4096}, 8, 2),
        ({"heads_kv": 2, "keys": 4096}, 8, 4),
        ({"heads_kv": 2, "keys": 4096, "right": 0}, 8, 2),
        ({"len_q": 1}, 64, 64),
    ],
    ids=str,
)
def test_query_heads_of_a_program(changes: dict[str, object], groups: int, heads: int) -> None:
    q = torch.empty(1, 2, 16384, 128, device="meta", dtype=torch.bfloat16)
    usual = describe((q,) * 5, None, Options(0.1))._replace(heads_kv=2)
    key = usual._replace(**changes)
    key = key._replace(heads=groups * key.heads_kv)
    assert configs.heads_of_item(key, key.width, 132) == heads


@pytest.mark.skipif(hopper.release() < hopper.FIRST, reason="this Triton has no such Gluon")
@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({}, False),
        ({"right": 0}, True),
        ({"left": 4000, "right": 0}, True),
        ({"left": 4000}, False),
        ({"right": 0, "len_q": 512, "len_k": 512}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", WIDTHS)
def test_who_takes_tiles_by_a_counter(width: int, changes: dict[str, object], counted: bool) -> None:
    from attn_n.backends.triton.hopper.prepare import forward

    q = torch.empty(1, 16, 16384, width, device="meta", dtype=torch.bfloat16)
    key = describe((q,) * 3, None, Options(0.1))._replace(**changes)
    assert configs.find(key, width).counted == counted
    assert forward(key, q.stride()).table == counted


@pytest.mark.parametrize(
    ("size", "size_v", "tile"),
    [
        (64, 64, 64), (40, 64, 64), (64, 72, 128), (72, 64, 128), (128, 128, 128), (136, 128, 192), (192, 128, 192),
        (192, 136, 256), (128, 136, 256), (200, 64, 256), (256, 256, 256), (264, 64, None), (64, 264, None),
    ],
)  # fmt: skip
def test_the_tile_of_a_head(size: int, size_v: int, tile: int | None) -> None:
    """Each head gets the narrowest tile that holds it."""
    found = configs.widths(size, size_v)
    assert (found and found.tile) == tile
    if found is not None:
        assert (found.head_dim, found.head_dim_v) == (size, size_v)
        assert found.tile_v >= size_v
        assert found.padded >= found.tile
        assert found.padded & (found.padded - 1) == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"window_left": 5, "softcap": 3.0, "n_kind": "per head", "return_lse": True}, None),
        ({"capability": (9, 0), "dtype": torch.float32}, "takes float16 and bfloat16, not float32"),
        ({"capability": (8, 0)}, "runs on compute capability 9.0"),
        ({"capability": (10, 0)}, "runs on compute capability 9.0"),
        ({"v_shape": (2, 8, 256, 128)}, None),
        ({"v_shape": (2, 8, 256, 264)}, "takes E and Ev up to 256, multiples of 8, the larger above 32, got 64, 264"),
        ({"v_shape": (2, 8, 256, 60)}, "takes E and Ev up to 256, multiples of 8, the larger above 32, got 64, 60"),
        (varlen, None),
        (varlen | {"k_stride": (512, 0, 1)}, "reads strides that are multiples of 16 bytes, and nothing expanded"),
        (varlen | {"v_stride": (516, 64, 1)}, "reads strides that are multiples of 16 bytes, and nothing expanded"),
        (varlen | {"alibi": True}, "has no alibi_slopes"),
        ({"alibi": True, "dropout_p": 0.1}, "has no dropout, no alibi_slopes"),
        ({"seqused": True, "leftpad": True, "return_lse": True}, None),
        ({"k_stride": (0, 0, 64, 1)}, "reads strides that are multiples of 16 bytes, and nothing expanded"),
    ],
    ids=str,
)  # fmt: skip
def test_why_not(changes: dict[str, object], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "release", lambda: hopper.LAST)  # whatever the Triton here
    found = HopperKernels().refusal(gpu_call(**changes))
    assert (found is None) if reason is None else str(found).startswith(reason)


@pytest.mark.skipif(hopper.release() < hopper.FIRST, reason="this Triton has no such Gluon")
@pytest.mark.parametrize(
    "strides",
    [
        *(dense_strides((3, 2, 5, 64), order) for order in ((0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (2, 0, 1, 3))),
        (0, 320, 64, 1), (656, 328, 64, 1),
        (1000, 328, 72, 1), (2**33, 328, 64, 1),
    ],
    ids=str,
)  # fmt: skip
def test_the_end_of_a_sequence_in_any_layout(strides: tuple[int, ...]) -> None:
    """What TMA counts to it by is a multiple of 16 bytes, and leads to the address."""
    from attn_n.backends.triton.hopper.prepare import ragged

    *same, unit, batch_step, row_step = ragged(strides)
    assert tuple(same) == strides
    assert unit % 8 == 0
    for batch, end in itertools.product(range(3), range(6)):
        assert (batch * batch_step + end * row_step) * unit == batch * strides[0] + end * strides[2]


@pytest.mark.skipif(hopper.release() < hopper.FIRST, reason="this Triton has no such Gluon")
def test_what_tma_can_count() -> None:
    from attn_n.backends.triton.hopper.prepare import can_count

    assert can_count((8, 16, 4096, 64), (2**22, 2**18, 64, 1))
    assert can_count((2, 1, 100, 64), (2**34, 64, 64, 1))
    assert not can_count((2, 1, 100, 64), (2**34 + 8, 64, 64, 1))
    assert can_count((1, 1, 100, 64), (2**34 + 8, 64, 64, 1))
    assert not can_count((2**20, 16, 128, 64), (0, 0, 64, 1))


def test_one_tensor_of_lengths_fixes_the_diagonal() -> None:
    """Two that begin at the same address need not be the same in the next call, which shares the prepared one."""
    q = torch.empty(2, 2, 50, 64)
    used, starts = torch.tensor([9, 4], dtype=torch.int32), torch.tensor([0, 9, 50], dtype=torch.int32)
    for same, other in ((used, used), (used, used.view(-1))):
        options = Options(0.1, seqused_q=same, seqused_k=other)
        assert describe((q, q, q), None, options).more_keys == (0 if same is other else None)
    assert describe((q, q, q), None, Options(0.1, seqused_q=used, seqused_k=used, leftpad_k=used)).more_keys is None
    assert describe((q, q, q), None, Options(0.1, seqused_q=used)).more_keys is None
    x = torch.empty(50, 2, 64)
    for same, other in ((starts, starts), (starts, starts.view(-1))):
        options = Options(0.1, cu_seqlens_q=same, cu_seqlens_k=other, max_seqlen_q=41, max_seqlen_k=41)
        assert describe((x, x, x), None, options).more_keys == (0 if same is other else None)


def test_an_older_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper.triton, "__version__", "3.5.1")
    assert HopperKernels().refusal(gpu_call()) == "needs Triton 3.6 or later, found 3.5.1"
    assert BACKEND.serving(gpu_call()) == "portable"


@pytest.mark.parametrize("training", [False, True])
def test_a_triton_newer_than_the_tests(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs by name alone, the loss is said once, and `explain` says so."""
    monkeypatch.setattr(hopper.triton, "__version__", "3.10.1")
    triton_backend._say_what_is_lost.cache_clear()
    # One of these calls has `triton:hopper` itself first in its order, the other one `triton`.
    call = gpu_call(
        n_kind="float", needs_grad=training, window_right=0, q_shape=(1, 8, 4096, 64), k_shape=(1, 8, 4096, 64)
    )
    with pytest.warns(RuntimeWarning, match=r"tested on Triton 3.6 to 3.9, found 3.10.1, so that triton:portable runs"):
        assert choose.choose(call, None)[0] == "triton:portable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose.choose(call, "triton:hopper")[0] == "triton:hopper"
        assert choose.choose(call, "triton")[0] == "triton:portable"
        said = str(explanation.explain(call, None))
    reason = "serves it, when asked for by name: tested on Triton 3.6 to 3.9, found 3.10.1"
    assert [line.split("  ")[-1] for line in said.splitlines() if "triton:hopper" in line] == [reason]
    assert BACKEND.serving(gpu_call(capability=(8, 0))) == "portable"


def test_private_names_of_gluon_are_in_one_file() -> None:
    """Names that another release of Triton may change are used in one file: private ones and renamed functions."""
    for path in Path(configs.__file__).parent.glob("*.py"):
        found = re.findall(r"libtriton|_core\b|_semantic|\w\._[a-z]\w*|\.async_\w+|block_type", path.read_text())
        found = [name for name in found if not name.startswith("f._")]  # self._launch and the like
        assert bool(found) == (path.name == "gluon_compat.py"), (path.name, found)
