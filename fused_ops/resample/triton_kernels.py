"""Triton kernels that resample maps, and that gather the gradients: one pass each way, no atomics.

A program has a block of columns, a block of channels and a few rows of the map that it writes. Rows are
numbers, the same for all its threads, and what columns need is found once for all rows. The grid is blocks of
columns and, fastest, of channels; groups of rows; images.

Positions are whole numbers. Output ``d`` of one axis reads the input at ``(d + 1/2) size / out_size - 1/2``,
which in units of ``1 / (2 out_size)`` is an integer: ``(2 d + 1) size - out_size``, at least 0 and at most
the last pixel's. So weights are exact up to their rounding at any size, and so are the ranges of outputs that
read an input.
"""

from __future__ import annotations

from fused_ops.core.triton_support import jit, tl


@jit
def _program(rows, group, blocks_c, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Image, first row and the one after the last, columns (BLOCK_P), channels (BLOCK_C) of this program."""
    block = tl.program_id(0)
    columns = (block // blocks_c) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (block % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * group
    return tl.program_id(2).to(tl.int64), first, tl.minimum(first + group, rows), columns, c


@jit
def _divide(number, divisor, inverse):
    """Quotient and remainder of whole numbers that are not negative; ``inverse`` is 1 / divisor in float32.

    A third of the instructions of a division. What is rounded cannot be off by more than one.
    """
    quotient = (number.to(tl.float32) * inverse).to(tl.int32)
    rest = number - quotient * divisor
    change = (rest >= divisor).to(tl.int32) - (rest < 0).to(tl.int32)
    return quotient + change, rest - change * divisor


@jit
def _nearest(d, size, scale):
    """The input pixel of output ``d``, as PyTorch rounds it; ``scale``: size / out_size in float32."""
    return tl.minimum(tl.floor(d.to(tl.float32) * scale).to(tl.int32), size - 1)


@jit
def _position(d, size, out_size):
    """Where output ``d`` reads the input, in units of 1 / (2 out_size)."""
    return tl.minimum(tl.maximum((2 * d + 1) * size - out_size, 0), (size - 1) * (2 * out_size))


@jit
def _readers_before(i, size, out_size, scale, inverse):
    """How many outputs read a pixel before ``i``, nearest; ``inverse``: 1 / size."""
    # What float32 makes of the boundary is at most one output from it.
    quotient, _ = _divide(i * out_size + size - 1, size, inverse)
    count = quotient - 1
    count += (_nearest(count, size, scale) < i).to(tl.int32)
    count += (_nearest(count, size, scale) < i).to(tl.int32)
    return tl.minimum(count, out_size)


@jit
def _readers(i, size, out_size, scale, inverse, MODE: tl.constexpr):
    """First output that reads pixel ``i``, and the one after the last.

    ``scale`` as of :func:`_nearest`; ``inverse``: nearest 1 / size, bilinear 1 / (2 size).
    """
    if MODE == "nearest":
        first = _readers_before(i, size, out_size, scale, inverse)
        end = _readers_before(i + 1, size, out_size, scale, inverse)
    else:
        # Those whose positions are less than one pixel away.
        from_here = out_size * (2 * i - 1) - size
        quotient, _ = _divide(tl.maximum(from_here, 0), 2 * size, inverse)
        first = tl.where(from_here < 0, 0, quotient + 1)
        to_here = tl.maximum(out_size * (2 * i + 3) - size, 0)
        quotient, _ = _divide(to_here + 2 * size - 1, 2 * size, inverse)
        end = tl.where(i == size - 1, out_size, tl.minimum(quotient, out_size))
    return first, end


@jit
def _weight(d, i, size, out_size, scale):
    """Bilinear weight of pixel ``i`` in an output ``d`` that reads it; ``scale`` is 1 / (2 out_size)."""
    distance = tl.abs(_position(d, size, out_size) - i * (2 * out_size))
    return (2 * out_size - distance).to(tl.float32) * scale


@jit
def forward_kernel(
    x_ptr,
    add_ptr,
    drop_path_ptr,
    base_ptr,
    out_ptr,
    channels,
    in_h,
    in_w,
    out_h,
    out_w,
    group,
    blocks_c,
    scale_h,
    scale_w,
    x_b,
    x_c,
    x_h,
    x_w,
    add_b,
    add_c,
    add_h,
    add_w,
    drop_path_b,
    out_b,
    out_c,
    out_row,
    out_column,
    MODE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Tiles (BLOCK_P columns, BLOCK_C channels), one per row, of ``drop_path * resampled + add``.

    With ``base_ptr``, strided as the output, of ``base + drop_path * (resampled + add)``.
    """
    image, first_row, last_row, p, c = _program(out_h, group, blocks_c, BLOCK_P, BLOCK_C)
    c_ok = (c < channels)[None, :]
    p_ok = p < out_w
    ok = p_ok[:, None] & c_ok
    c = c.to(tl.int64)[None, :]
    offsets = image * out_b + p.to(tl.int64)[:, None] * out_column + c * out_c
    target = out_ptr + offsets
    if base_ptr is not None:
        base_ptr += offsets
    if add_ptr is not None:
        add_ptr += image * add_b + p.to(tl.int64)[:, None] * add_w + c * add_c
    if drop_path_ptr is not None:
        factor = tl.load(drop_path_ptr + image * drop_path_b).to(tl.float32)
    if MODE == "nearest":
        left = _nearest(p, in_w, scale_w)
    else:
        left, right = _divide(_position(p, in_w, out_w), 2 * out_w, scale_w)
        # A pixel without weight is not read: an infinity there would not be one of the result's.
        has_right = p_ok & (right > 0)
        of_right = (right.to(tl.float32) * scale_w)[:, None]
        of_left = ((2 * out_w - right).to(tl.float32) * scale_w)[:, None]
    x_ptr += image * x_b + left.to(tl.int64)[:, None] * x_w + c * x_c
    for row in range(first_row, last_row):
        if MODE == "nearest":
            top = _nearest(tl.cast(row, tl.int32), in_h, scale_h)
            value = tl.load(x_ptr + top.to(tl.int64) * x_h, mask=ok, other=0.0).to(tl.float32)
        else:
            top, below = _divide(_position(row, in_h, out_h), 2 * out_h, scale_h)
            # A block, since masks may not combine a block with a number (Triton 3.9's interpreter).
            has_below = below + tl.zeros((BLOCK_P,), tl.int32) > 0
            pixel = x_ptr + top.to(tl.int64) * x_h
            a = tl.load(pixel, mask=ok, other=0.0).to(tl.float32)
            b = tl.load(pixel + x_w, mask=has_right[:, None] & c_ok, other=0.0).to(tl.float32)
            d = tl.load(pixel + x_h, mask=(p_ok & has_below)[:, None] & c_ok, other=0.0).to(tl.float32)
            e_ok = (has_right & has_below)[:, None] & c_ok
            e = tl.load(pixel + x_h + x_w, mask=e_ok, other=0.0).to(tl.float32)
            of_below = below.to(tl.float32) * scale_h
            of_top = (2 * out_h - below).to(tl.float32) * scale_h
            value = of_top * (of_left * a + of_right * b) + of_below * (of_left * d + of_right * e)
        if drop_path_ptr is not None and base_ptr is None:
            value *= factor
        if add_ptr is not None:
            place = add_ptr + tl.cast(row, tl.int64) * add_h
            value += tl.load(place, mask=ok, other=0.0).to(tl.float32)
        if base_ptr is not None:
            if drop_path_ptr is not None:
                value *= factor
            place = base_ptr + tl.cast(row, tl.int64) * out_row
            value += tl.load(place, mask=ok, other=0.0).to(tl.float32)
        place = target + tl.cast(row, tl.int64) * out_row
        tl.store(place, value.to(out_ptr.dtype.element_ty), mask=ok)


@jit
def backward_kernel(
    grad_ptr,
    drop_path_ptr,
    x_grad_ptr,
    channels,
    in_h,
    in_w,
    out_h,
    out_w,
    group,
    blocks_c,
    scale_h,
    scale_w,
    inverse_h,
    inverse_w,
    grad_b,
    grad_c,
    grad_h,
    grad_w,
    drop_path_b,
    x_b,
    x_c,
    x_h,
    x_w,
    MODE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Tiles (BLOCK_P columns, BLOCK_C channels), one per row, of the map's gradient.

    The sum runs over the output rows that read the row, and of each, TAPS columns at a time, over the output
    columns that read the column.
    """
    image, first_row, last_row, p, c = _program(in_h, group, blocks_c, BLOCK_P, BLOCK_C)
    p_ok = p < in_w
    c_ok = (c < channels)[None, :]
    c = c.to(tl.int64)[None, :]
    target = x_grad_ptr + image * x_b + p.to(tl.int64)[:, None] * x_w + c * x_c
    if drop_path_ptr is not None:
        factor = tl.load(drop_path_ptr + image * drop_path_b).to(tl.float32)
    first, end = _readers(p, in_w, out_w, scale_w, inverse_w, MODE)
    end = tl.where(p_ok, end, first)
    most = tl.max(end - first, 0)
    grad_ptr += image * grad_b + first.to(tl.int64)[:, None] * grad_w + c * grad_c
    for row in range(first_row, last_row):
        begin, stop = _readers(row, in_h, out_h, scale_h, inverse_h, MODE)
        value = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for start in range(0, most, TAPS):
            for from_row in range(begin, stop):
                place = grad_ptr + (tl.cast(from_row, tl.int64) * grad_h + tl.cast(start, tl.int64) * grad_w)
                line = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
                for tap in tl.static_range(TAPS):
                    column = first + start + tap
                    ok = (column < end)[:, None] & c_ok
                    grad = tl.load(place + tap * grad_w, mask=ok, other=0.0).to(tl.float32)
                    if MODE == "bilinear":
                        grad *= _weight(column, p, in_w, out_w, scale_w)[:, None]
                    line += grad
                if MODE == "bilinear":
                    line *= _weight(from_row, row, in_h, out_h, scale_h)
                value += line
        if drop_path_ptr is not None:
            value *= factor
        place = target + tl.cast(row, tl.int64) * x_h
        tl.store(place, value.to(x_grad_ptr.dtype.element_ty), mask=p_ok[:, None] & c_ok)
