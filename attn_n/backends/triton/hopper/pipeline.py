"""What the roles of the Hopper kernels share: rings of buffers, and which blocks of keys a strip of queries sees."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """`COUNT` barriers whose phase ends with that many arrivals (and the bytes that are expected)."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit
def following(stage, phase, STAGES: gl.constexpr):
    """The next buffer of a ring, and the parity of its phase."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def blocks_seen(first, last, len_q, len_k, left, right, TILE_K: gl.constexpr):
    """`begin, full_begin, full_end, end`: the blocks of keys that the queries `first ... last` see, at least one.

    All of these queries see all keys of the blocks from `full_begin` to before `full_end`.
    """
    begin, full_begin, end_key, full_end_key = 0, 0, len_k, len_k
    last = gl.minimum(last, len_q - 1)
    if right is not None:
        end_key = gl.minimum(len_k, last + (len_k - len_q) + right + 1)
        full_end_key = gl.minimum(len_k, first + (len_k - len_q) + right + 1)
    if left is not None:
        begin = gl.maximum(0, first + (len_k - len_q) - left) // TILE_K
        full_begin = (gl.maximum(0, last + (len_k - len_q) - left) + TILE_K - 1) // TILE_K
    end = gl.maximum((gl.maximum(end_key, 0) + TILE_K - 1) // TILE_K, 1)
    return gl.minimum(begin, end - 1), full_begin, gl.maximum(full_end_key, 0) // TILE_K, end
