"""A mailbox in shared memory: numbers that the producer writes for a tile, and the consumers read.

What is read there the compiler knows to be the same for all threads, so that addresses stay in uniform registers. The
barrier that the producer arrives at next publishes what it has written. A mailbox has at least two slots, so that the
numbers of the next tile can be written while those of this one are read.

`FIELDS` are the names of the numbers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def new_mailbox(FIELDS: gl.constexpr, SLOTS: gl.constexpr = 2):
    """Allocate int32 `[slots * fields, 1]`."""
    return gl.allocate_shared_memory(gl.int32, [SLOTS * len(FIELDS), 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.constexpr_function
def place_of(name, fields):
    return fields.index(name)


@gluon.jit
def mailbox_write(mailbox, slot, FIELDS: gl.constexpr, NAME: gl.constexpr, number):
    place = slot * len(FIELDS) + place_of(NAME, FIELDS)
    mailbox.index(place).store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def mailbox_read(mailbox, slot, FIELDS: gl.constexpr, NAME: gl.constexpr):
    place = slot * len(FIELDS) + place_of(NAME, FIELDS)
    return gl.max(mailbox.index(place).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
