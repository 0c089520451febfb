"""Rings of buffers in shared memory, between a producer that fills them by TMA and consumers that read them."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


class Ring(NamedTuple):
    """A ring has buffers, and two barriers for each of them.

    `full` completes a phase when the bytes that TMA was asked for have arrived, `empty` when every consumer has
    released the buffer.
    """

    buffers: gl.shared_memory_descriptor  # [stages, ...], or a tuple of several that are filled together
    full: gl.shared_memory_descriptor  # [stages, 1]
    empty: gl.shared_memory_descriptor  # [stages, 1]


class State(NamedTuple):
    """A role is at a buffer of a ring, and waits for a phase of this parity.

    Each role counts for itself. A producer begins with parity 1: a wait for the phase before the first one returns at
    once, since all buffers are empty.
    """

    stage: gl.tensor
    phase: gl.tensor


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Make `COUNT` barriers, whose phase completes after `ARRIVALS` arrivals and the bytes that are expected."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit
def advance(state, ring):
    """Go on to the next buffer; the parity flips when the ring has gone around."""
    stage, phase = state
    stage += 1
    if stage == ring.full.shape[0]:
        stage = 0
        phase ^= 1
    return State(stage, phase)


@gluon.jit
def producer_acquire(ring, state, BYTES: gl.constexpr):
    """Wait until the buffer is empty; `full` then waits for that many bytes."""
    mbarrier.wait(ring.empty.index(state.stage), state.phase)
    mbarrier.expect(ring.full.index(state.stage), BYTES)


@gluon.jit
def consumer_wait(ring, state):
    """Wait until the buffer is full."""
    mbarrier.wait(ring.full.index(state.stage), state.phase)


@gluon.jit
def consumer_release(ring, stage):
    """Arrive at `empty`: this consumer has read the buffer."""
    mbarrier.arrive(ring.empty.index(stage), count=1)


@gluon.jit
def state_of(count, STAGES: gl.constexpr):
    """Return the state of the use of that number, of a ring whose uses are counted from 0."""
    return State(count % STAGES, (count // STAGES) & 1)


@gluon.jit
def wait_turn(barriers, turn):
    """Wait at one of two barriers: `turn` counts modulo 4, so that it is 2 * parity + stage."""
    mbarrier.wait(barriers.index(turn & 1), turn >> 1)
