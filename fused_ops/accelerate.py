"""Fused operators inside any model: ``accelerate(model)`` puts them in, ``restore(model)`` takes them out.

What is exchanged keeps its place. A depthwise convolution, the norm and the activation after it stay the same
module objects with the same parameters, buffers and names; only their classes change, to subclasses of their
own: the convolution computes the whole chain in one operator, the other two hand their input through. So do
the modules of an MLP, whose first layer computes the norm before it and all that follows. Gates and
attentions call their own layers between the operators. So optimizers, checkpoints, EMA copies,
DistributedDataParallel and weight sharing notice nothing.

Whether a chain runs fused is decided at every call from what is there then: each of its modules asks whether
all of them are still in their places and whether somebody hooked into one. If not, all run as stock modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_ops.acceleration.attention import Attentions
from fused_ops.acceleration.conv_mlps import ConvMlps
from fused_ops.acceleration.depthwise import Depthwise
from fused_ops.acceleration.exchange import Exchanged, is_linked, take_out
from fused_ops.acceleration.flow import data_flow
from fused_ops.acceleration.gates import Gates
from fused_ops.acceleration.hr_chains import HRChains
from fused_ops.acceleration.mlps import Mlps
from fused_ops.acceleration.plan import Plan
from fused_ops.acceleration.report import Report, Row
from fused_ops.core.explain import explain

# In the order in which they claim modules.
_FAMILIES = (HRChains, ConvMlps, Depthwise, Attentions, Gates, Mlps)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of the wrappers of torch.compile and of data parallelism."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def _example(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """The arguments that ``example`` says."""
    if isinstance(example, Tensor):
        return (example,)
    example = tuple(example)
    if not example or not all(isinstance(size, int) for size in example):
        return example
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.empty(example, device="meta", dtype=like.dtype)
    channels_last = any(
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in model.parameters()
    )
    image = torch.empty_like(image, device=like.device)
    if channels_last and image.dim() == 4:
        image = image.contiguous(memory_format=torch.channels_last)
    return (image,)


def _weigh(
    model: nn.Module, plans: Sequence[Plan], arguments: tuple[Any, ...]
) -> dict[str, tuple[int, int, str]]:
    """By name of the module: bytes of the stock modules, bytes fused, why stock PyTorch is chosen."""
    calls: dict[str, list[tuple[int, int]]] = {plan.name: [] for plan in plans}
    on_gpu: set[str] = set()

    def observe(plan: Plan) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            calls[plan.name].append(plan.family.weigh(module, inputs[0]))
            if inputs[0].is_cuda:
                on_gpu.add(plan.name)

        return hook

    handles = [plan.module.register_forward_pre_hook(observe(plan)) for plan in plans]
    try:
        choices = explain(model, *arguments).choices
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, made in calls.items():
        declined = ""
        for choice in choices:
            # On a CPU both ways are the same PyTorch calls, and the model may yet be moved to a GPU.
            if choice.module == name and choice.backend == "reference" and name in on_gpu:
                why = "; ".join(f"{backend}: {reason}" for backend, reason in choice.rejected.items())
                declined = choice.reason if "measured" in choice.reason else why or choice.reason
        if made:
            stock, fused = map(sum, zip(*made, strict=True))
            found[name] = (stock, fused, declined)
    return found


def accelerate(model: nn.Module, *, dry_run: bool = False, example: Any = None) -> Report:
    """Have fused operators compute what they can of ``model``, in place; :func:`restore` undoes it.

    Exchanged are depthwise convolutions together with the BatchNorm and the activation that certainly follow
    them: the convolution's output goes nowhere but into the norm, the norm's nowhere but into the activation,
    in training and in evaluation mode. Where that cannot be seen, the convolution is exchanged alone.
    MLPs of narrow tokens or maps (two layers, Linear or 1x1 convolutions, and the activation between them)
    are exchanged together with the LayerNorm or BatchNorm that certainly comes before them. Gates of timm and
    torchvision (squeeze-and-excitation, ECA, CBAM, global context) pool and scale by operators, and
    spatial-reduction attention of PVTv2, Twins and Next-ViT attends by one. A module that computes HIRI-ViT's
    HR-block and nothing else does so by one, whatever it and its parts are called. Where the result of a
    depthwise chain, an MLP or a gate is certainly added to something, by way of layer scale and drop path,
    the addition joins the operator.
    Parameters, buffers, names and module objects stay as they are. A chain with a hook on one of its modules
    runs as stock modules for as long as the hook is there.

    Inside an exchanged chain the convolution's output is that of the whole chain: call :func:`restore` before
    taking single modules out of a model.

    Args:
        model: any module; compiled and DataParallel ones too.
        dry_run: only report.
        example: what the model will be called with: a tensor, a tuple of arguments, or the shape of an image
            batch. With it the report has bytes, and what would run on stock PyTorch on the GPU (because that
            was measured faster, or no kernel can run it) is not exchanged. Nothing is computed.

    Returns:
        A row per depthwise convolution, attention, MLP, gate and HR chain: exchanged or not, and why.
    """
    model = _unwrapped(model)
    for module in list(model.modules()):
        # Part of a chain that somebody took apart, which runs as stock modules anyway.
        if isinstance(module, Exchanged) and not is_linked(module):
            take_out(module)
    flow = data_flow(model, {name for family in _FAMILIES for name in family.whole})
    claimed: set[int] = set()
    plans = [plan for family in _FAMILIES for plan in family.plans(model, flow, claimed)]
    names = {id(module): name for name, module in model.named_modules()}
    open_plans = [plan for plan in plans if not plan.declined]
    for plan in open_plans:
        if not plan.already:
            plan.put_in(model, names)
    note, weights = "", {}
    if example is not None:
        try:
            weights = _weigh(model, open_plans, _example(model, example))
        except Exception as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            note = f"The example was not used: the model does not run without data ({text})"
    rows = []
    for plan in plans:
        reason = plan.declined or plan.remark
        members = tuple(names[id(m)] for m in plan.members if m is not None) if not plan.declined else ()
        row = Row(plan.name, plan.words, not plan.declined, plan.family.kind, reason, members)
        if plan.name in weights:
            stock, fused, declined = weights[plan.name]
            row = replace(row, stock_bytes=stock, fused_bytes=fused)
            if declined:
                row = replace(row, exchanged=False, reason=declined, members=())
        rows.append(row)
        if not plan.already and not plan.declined and (dry_run or not row.exchanged):
            for module in plan.members:
                if module is not None:
                    take_out(module)
    return Report(tuple(rows), note)


def restore(model: nn.Module) -> int:
    """Undo :func:`accelerate`: the identical modules, of their own classes, with no attribute left.

    Args:
        model: a module, or a part or a copy of one, that may hold exchanged modules.

    Returns:
        How many modules were set back.
    """
    exchanged = [module for module in model.modules() if isinstance(module, Exchanged)]
    for module in exchanged:
        take_out(module)
    return len(exchanged)
