"""The Hopper kernels' inline PTX: what Gluon has no function for, and what keeps ptxas from moving things."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def cast_operand(p, LAYOUT: gl.constexpr, dtype: gl.constexpr):
    """Cast p to the left operand of the next wgmma, two numbers an instruction: the compiler does not always find that.

    (Forward: +15 % under a causal mask, +9 % where three consumers share the registers.)
    """
    if dtype == gl.bfloat16:
        x = gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [p], gl.bfloat16, is_pure=True, pack=2)
    else:
        x = gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [p], gl.float16, is_pure=True, pack=2)
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def pin_here(x):
    """Compute x at this place: the compiler would do so between two wgmmas, and wait for the first one there."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.float32, False, 1)


@gluon.jit
def recomputed(index):
    """Return an index in a form that nothing can be computed from ahead of time.

    The descriptors of all wgmmas on a buffer that a loop never changes are constants of that loop. The compiler keeps
    them in registers, and spills others for them; to compute them anew costs less. (Bytes that a thread of the backward
    spills at E = 128, by Triton 3.6 and 3.9: none and 24, not 240 and 644. On 3.9 that is 3 to 22 % faster.)
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [index], gl.int32, False, 1)


@gluon.jit
def consumer_barrier():
    """Wait for the other consumer at a named barrier. An mbarrier takes longer, and Gluon has no named ones."""
    gl.inline_asm_elementwise("mov.b32 $0, $1; bar.sync 8, 256;", "=r,r", [0], gl.int32, False, 1)


@gluon.constexpr_function
def if_any(comparison, number, first, other, lines):
    """Write PTX of lines which a warp skips if neither of two numbers of any thread compares so with `number`."""
    head = [
        ".reg .pred some;",
        f"setp.{comparison}.f32 some, {first}, {number};",
        f"setp.{comparison}.or.f32 some, {other}, {number}, some;",
        "vote.sync.any.pred some, some, 0xFFFFFFFF;",
        "@!some bra.uni PAST;",
    ]
    return "{" + "\n".join([*head, *lines, "PAST:"]) + "}"


@gluon.constexpr_function
def multiplications(count):
    """Write PTX that multiplies a thread's numbers by their factors, if some are not 1; two rows take turns of two."""
    factors = [f"${2 * count + i}" for i in range(count)]
    lines = [f"mul.f32 ${i}, ${i}, {factor};" for i, factor in enumerate(factors)]
    return if_any("neu", "0f3F800000", factors[0], factors[2], lines)


@gluon.constexpr_function
def in_place(count):
    """Write the constraints: `count` outputs, which are the inputs too, and as many factors."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


@gluon.jit
def multiply_unless_one(acc, factor):
    """Multiply acc `[64, E]` by a factor of each row; a warp skips this if the factors of all its rows are 1."""
    COUNT: gl.constexpr = acc.shape[1] // 2  # numbers of a thread, of 128
    return gl.inline_asm_elementwise(
        multiplications(COUNT), in_place(COUNT), [acc, factor], gl.float32, is_pure=True, pack=COUNT
    )


# No sum is negative. The skipped lines are many, or ptxas would make predicated instructions of the branch.
NEVER_TAKEN = gl.constexpr(if_any("lt", "0f00000000", "$0", "$1", ["mul.f32 $0, $0, $1;"] * 16))


@gluon.jit
def branch_fence(sums):
    """Return the sums behind an opaque branch, across which ptxas moves nothing.

    So all that is summed up has been computed before what follows.
    """
    return gl.inline_asm_elementwise(NEVER_TAKEN, "=f,=f,0,1", [sums], gl.float32, is_pure=True, pack=2)


@gluon.jit
def arrive_named(barrier, THREADS: gl.constexpr):
    """Arrive at a named barrier of that many threads, without waiting; the number of the barrier may vary."""
    gl.inline_asm_elementwise(
        "mov.b32 $0, $1; bar.arrive $1, $2;", "=r,r,n", [barrier, THREADS], gl.int32, False, 1
    )  # fmt: skip


@gluon.jit
def wait_named(barrier, THREADS: gl.constexpr):
    """Wait at such a barrier."""
    gl.inline_asm_elementwise("mov.b32 $0, $1; bar.sync $1, $2;", "=r,r,n", [barrier, THREADS], gl.int32, False, 1)


@gluon.jit
def announce_p():
    """Arrive at another named barrier when P is in shared memory, without waiting there."""
    gl.inline_asm_elementwise("mov.b32 $0, $1; bar.arrive 9, 256;", "=r,r", [0], gl.int32, False, 1)


@gluon.jit
def await_p():
    """Wait at that barrier for the other consumer's P."""
    gl.inline_asm_elementwise("mov.b32 $0, $1; bar.sync 9, 256;", "=r,r", [0], gl.int32, False, 1)


@gluon.jit
def add_accumulator(x, tile, LAYOUT: gl.constexpr):
    """Add an accumulator to a float32 sum in global memory, by tiles of 64 x 64.

    In these the order is that of the registers, as `postprocess_kernel` reads them: four numbers of a thread, of all
    threads, then the next four.
    """
    rows = gl.expand_dims(gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT)), 1)
    columns = gl.expand_dims(gl.arange(0, tile.shape[1], gl.SliceLayout(0, LAYOUT)), 0)
    thread = rows // 16 * 32 + rows % 8 * 4 + columns % 8 // 2
    gl.inline_asm_elementwise(
        "mov.b32 $0, 0; red.relaxed.gpu.global.add.v4.f32 [$1], {$5, $6, $7, $8};", "=r,l,l,l,l,r,r,r,r",
        [x.to(gl.int64) + 16 * thread.to(gl.int64) + columns.to(gl.int64) // 8 * 2048, tile], gl.int8, False, 4,
    )  # fmt: skip
