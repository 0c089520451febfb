"""Every name of Gluon that is private or differs between releases of Triton: kernels take it from here.

here                Triton 3.6 and 3.7                  later
async_load          tma.async_copy_global_to_shared     3.8: tma.async_load; 3.9 refuses the old name
async_store         tma.async_copy_shared_to_global     3.8: tma.async_store; 3.9 refuses the old name
async_reduce_add    a method of the builder alone       3.8: tma.async_atomic_add
tile_bytes          descriptor.block_type.nbytes        3.8: nbytes_per_cta
reinterpret         buffer._reinterpret                 3.8 refuses another size; 3.9: buffer.reinterpret
"""

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

if hasattr(tma, "async_load"):
    async_load, async_store, async_reduce_add = tma.async_load, tma.async_store, tma.async_atomic_add
else:
    async_load, async_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

    @builtin
    def async_reduce_add(descriptor, coordinates, buffer, _semantic=None):
        """Begin to add a tile in shared memory to global memory, by TMA."""
        coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
        _semantic.builder.create_async_tma_reduce(
            ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, buffer.handle
        )


@builtin
def tile_bytes(descriptor, _semantic=None):
    """Return how many bytes a load of one tile brings."""
    if hasattr(descriptor, "nbytes_per_cta"):
        return descriptor.nbytes_per_cta
    return descriptor.block_type.nbytes


@builtin
def reinterpret(buffer, dtype, shape, layout, _semantic=None):
    """View the same shared memory as another dtype, shape or layout of the same size."""
    view = buffer.reinterpret if hasattr(buffer, "reinterpret") else buffer._reinterpret
    return view(dtype, shape, layout, _semantic=_semantic)
