"""What Triton kernels with small weight matrices share: products, vectors and chunks of matrices."""

from __future__ import annotations

from fused_ops.core import environment
from fused_ops.core.triton_support import jit, tl

if environment.interpreting():
    # The interpreter's product of bfloat16 operands is wrong; of their float32 values it is exact enough.
    @jit
    def dot(a, b, acc):
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
else:

    @jit
    def dot(a, b, acc):
        """acc + a b, in float32; float32 operands are not cut to TensorFloat-32."""
        return tl.dot(a, b, acc, input_precision="ieee")


@jit
def vector(ptr, c, size, default):
    """A vector (1, BLOCK) in float32; ``default`` where there is none, zero beyond its size."""
    if ptr is not None:
        return tl.load(ptr + c, mask=c < size, other=0.0).to(tl.float32)[None, :]
    else:
        return tl.full((1, c.shape[0]), default, tl.float32)


@jit
def weight_chunk(weight_ptr, rows, columns, row_count, column_count):
    """Rows x columns of a row-major matrix (row_count, column_count), zero outside."""
    ok = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(weight_ptr + rows[:, None] * column_count + columns[None, :], mask=ok, other=0.0)
