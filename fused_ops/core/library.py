"""One way to define an operator: schema, fake, autograd, FLOP and byte formulas, in the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fused_ops.core.backends import Backend

_library = torch.library.Library("fused_ops", "DEF")
_operators: dict[str, Operator] = {}
_blocks: dict[str, Block] = {}


@dataclass(frozen=True)
class Operator:
    """An operator family as tests, bench and ``explain`` see it.

    Attributes:
        name: name of the family and of its folder.
        function: public function, ``function(**case.arguments)``.
        backends: implementations, in the order in which ``auto`` tries them.
        cases: sample inputs (see :mod:`fused_ops.core.cases`).
        least_bytes: ``least_bytes(call, direction) -> int``, the bytes that the operator has to move through
            memory for the schedule that it uses; ``direction`` is ``forward`` or ``backward``.
        overloads: the torch operators behind it.
        launch_count: ``launch_count(call, direction) -> int``, launches of the Triton backend for a call with
            every gradient; None where not known.
        matrix_products: whether most of its operations are matrix products, which tensor cores run.
    """

    name: str
    function: Callable[..., Any]
    backends: tuple[Backend, ...]
    cases: Callable[[], Sequence[Any]]
    least_bytes: Callable[[Any, str], int]
    overloads: tuple[Any, ...]
    launch_count: Callable[[Any, str], int] | None = None
    matrix_products: bool = False


def register(operator: Operator) -> Operator:
    """Add ``operator`` to the registry over which tests and bench go."""
    return _add(operator, _operators)


def operators() -> dict[str, Operator]:
    """Every registered operator family by name."""
    return dict(_operators)


@dataclass(frozen=True)
class Block:
    """A block of a model that can run as one operator, by the kernels of several families.

    Attributes:
        name: of the operator and of the block's folder.
        function: ``function(**case.arguments)``.
        cases: sample blocks and inputs (see :mod:`fused_ops.core.cases`).
        families: operators whose kernels it launches.
    """

    name: str
    function: Callable[..., Any]
    cases: Callable[[], Sequence[Any]]
    families: tuple[str, ...]


def register_block(block: Block) -> Block:
    """Add ``block`` to those that the bench goes over."""
    return _add(block, _blocks)


def _add(entry: Any, known: dict[str, Any]) -> Any:
    if entry.name in known:
        raise ValueError(f"{type(entry).__name__.lower()} {entry.name!r} is registered already")
    known[entry.name] = entry
    return entry


def blocks() -> dict[str, Block]:
    """Every registered block by name."""
    return dict(_blocks)


def define(
    schema: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    flops: Callable[..., int],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Define the torch operator ``fused_ops::<schema>``.

    The low-level ``Library`` calls are used because a call through ``torch.library.custom_op`` costs several
    microseconds more on the host.

    Args:
        schema: name, arguments and returns; functional (no argument is written).
        implementation: runs it, on CPU and CUDA tensors.
        fake: output shapes, dtypes and strides from the inputs' metadata.
        flops: formula for ``torch.utils.flop_counter``, called with shapes in place of tensors.
        setup_context, backward: autograd, as in ``torch.library.register_autograd``.

    Returns:
        The operator's default overload.
    """
    name = _name_of(schema)
    # Strides are part of what a kernel sees, so the compiler must not change them behind its back.
    _library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"fused_ops::{name}", fake, lib=_library)
    packet = getattr(torch.ops.fused_ops, name)
    if backward is not None:
        torch.library.register_autograd(
            f"fused_ops::{name}", backward, setup_context=setup_context, lib=_library
        )
    register_flop_formula(packet)(flops)
    return packet.default


class DifferentiableOperator:
    """A pair of torch operators, one for each direction, called without the dispatcher where it can be.

    Attributes:
        forward, backward: the two operators' default overloads.
    """

    def __init__(
        self,
        forward_schema: str,
        backward_schema: str,
        *,
        forward: Callable[..., Any],
        forward_fake: Callable[..., Any],
        forward_flops: Callable[..., int],
        backward: Callable[..., Any],
        backward_fake: Callable[..., Any],
        backward_flops: Callable[..., int],
        setup_context: Callable[..., None],
        autograd: Callable[..., Any],
        once_differentiable: str,
    ) -> None:
        """Define both operators; see :func:`define` for schemas, fakes and formulas.

        Args:
            forward_schema, backward_schema: name tensors before everything else; the backward one ends with
                ``bool[] needs, str backend``, where ``needs`` says which of its results are wanted.
            forward, backward: run the operators.
            setup_context: ``setup_context(ctx, inputs, output)`` keeps what ``autograd`` needs.
            autograd: ``autograd(ctx, *output_gradients)`` gives one gradient per input of forward.
            once_differentiable: what to say to who differentiates the backward operator.
        """

        def refuse(ctx, *_):
            raise RuntimeError(f"fused_ops::{_name_of(backward_schema)} {once_differentiable}")

        self._forward, self._backward = forward, backward
        self._inputs, self._gradient_inputs = (
            schema.partition("->")[0].count("Tensor") for schema in (forward_schema, backward_schema)
        )
        self.forward = define(
            forward_schema,
            forward,
            fake=forward_fake,
            flops=forward_flops,
            setup_context=setup_context,
            backward=autograd,
        )
        self.backward = define(
            backward_schema, backward, fake=backward_fake, flops=backward_flops, backward=refuse
        )

        class Direct(torch.autograd.Function):
            """The registered operator's forward and autograd without the dispatcher between them."""

            @staticmethod
            def forward(ctx, *inputs):
                output = forward(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx, *gradients):
                return autograd(ctx, *gradients)

        self._recorded = Direct.apply

    @property
    def overloads(self) -> tuple[Any, Any]:
        return (self.forward, self.backward)

    def run(self, needs_grad: bool, *inputs: Any) -> Any:
        """Call the forward operator; ``needs_grad``: whether any input gets a gradient."""
        if not plain_eager(*inputs[: self._inputs]):
            return self.forward(*inputs)
        return self._recorded(*inputs) if needs_grad else self._forward(*inputs)

    def run_backward(self, *inputs: Any) -> list[Tensor | None]:
        """Call the backward operator; where gradients are recorded, the registered one, which refuses.

        Returns:
            Its results, None for those that are not wanted.
        """
        registered = torch.is_grad_enabled() or not plain_eager(*inputs[: self._gradient_inputs])
        gradients = (self.backward if registered else self._backward)(*inputs)
        return [gradient if need else None for gradient, need in zip(gradients, inputs[-2], strict=True)]


def _name_of(schema: str) -> str:
    return schema[: schema.index("(")]


def plain_eager(*tensors: Tensor | list[Tensor] | None) -> bool:
    """Whether a call may skip the dispatcher: nothing is traced, transformed, recorded or subclassed.

    A call through the dispatcher costs the host several times what the launch of a small kernel does, most of
    it in the autograd that ``torch.library`` puts around an operator.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(
        tensor is None or type(tensor) in _PLAIN or (type(tensor) is list and plain_eager(*tensor))
        for tensor in tensors
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def is_channels_last(x: Tensor) -> bool:
    """Whether stock PyTorch would give an operator on ``x`` a channels_last output.

    The rule of PyTorch's ``suggest_memory_format``: also true for channel slices of channels_last tensors,
    false where both layouts describe the strides.
    """
    dense = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if dense or x.is_contiguous():
        # Both are contiguous where the order of dimensions makes no difference.
        return dense and not x.is_contiguous()
    if x.dim() != 4 or x.stride(1) == 0:
        return False
    smallest = 0
    for dimension in (1, 3, 2, 0):
        size, stride = x.shape[dimension], x.stride(dimension)
        if size == 0 or stride < smallest:
            return False
        if dimension == 0 and smallest == x.stride(1):
            return False
        smallest = stride * size if size > 1 else stride
    return True


def memory_format(x: Tensor) -> torch.memory_format:
    """Memory format of the output of an operator on ``x``."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def empty(shape: Iterable[int], like: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised tensor of ``shape`` in the layout, dtype and device of ``like``.

    Implementations and fakes both allocate with it, so that they cannot disagree on strides.
    """
    return torch.empty(
        tuple(shape),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=memory_format(like),
    )


def absent(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What an operator returns in place of an output that nobody asked for."""
    return torch.empty(0, dtype=dtype or like.dtype, device=like.device)
