"""Data flow between the modules of a model, by tracing what traces and reading the code of the rest."""

from __future__ import annotations

import ast
import contextlib
import inspect
import operator
import random
import textwrap
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fused_ops.acceleration.exchange import type_name
from fused_ops.acceleration.layers import is_norm, only_scales
from fused_ops.core.hooks import HOOKS


@dataclass
class _Call:
    """One call of a module in a trace.

    Attributes:
        producer, consumer: whose output it alone uses, and who alone uses its own.
        then: who alone uses its output, permuted or multiplied in between or not.
        adder: the module whose code adds the output, permuted or multiplied or not, to something, and that is
            its only use.
    """

    producer: nn.Module | None
    consumer: nn.Module | None
    then: nn.Module | None = None
    adder: nn.Module | None = None


@dataclass
class Tail:
    """What certainly happens to a module's output: it is scaled by ``modules`` and added by ``adder``."""

    modules: tuple[nn.Module, ...]
    adder: nn.Module


@dataclass
class Flow:
    """Data flow between the modules of a model.

    Attributes:
        calls: by ``id`` of a module, its calls in every trace.
        unknown: ids of modules that may also be called in ways that no trace shows.
        whole: names of classes whose modules are not looked into.
    """

    whole: Set[str] = frozenset()
    calls: dict[int, list[_Call]] = field(default_factory=dict)
    unknown: set[int] = field(default_factory=set)

    def follower(self, module: nn.Module) -> nn.Module | None:
        """The module whose first argument every output of ``module`` is, and that has no other one."""
        calls = self.calls.get(id(module), [])
        following = calls[0].consumer if calls else None
        if following is None or id(module) in self.unknown or id(following) in self.unknown:
            return None
        certain = all(call.consumer is following for call in calls)
        certain = certain and all(call.producer is module for call in self.calls[id(following)])
        return following if certain else None

    def leader(self, module: nn.Module) -> nn.Module | None:
        """The module whose :meth:`follower` is ``module``."""
        calls = self.calls.get(id(module), [])
        leading = calls[0].producer if calls else None
        return leading if leading is not None and self.follower(leading) is module else None

    def tail(self, module: nn.Module) -> Tail | None:
        """What scales the output of ``module`` on the way to an addition; None where that is not certain."""
        passed: list[nn.Module] = []
        while True:
            calls = self.calls.get(id(module), [])
            if not calls or id(module) in self.unknown:
                return None
            first = calls[0]
            if first.adder is not None:
                certain = all(call.adder is first.adder for call in calls)
                return Tail(tuple(passed), first.adder) if certain else None
            module = first.then
            if module is None or any(call.then is not module for call in calls) or not only_scales(module):
                return None
            passed.append(module)


def is_fused(module: nn.Module) -> bool:
    """Whether a module is one of the fused ones of this package; the zoo's models are made of them."""
    return type(module).__module__.startswith("fused_ops.") and not type(module).__module__.startswith(
        "fused_ops.models."
    )


def inside_fused(model: nn.Module) -> set[int]:
    """Ids of the modules inside of fused ones of this package."""
    ours = (module for module in model.modules() if is_fused(module))
    return {id(inner) for module in ours for inner in module.modules() if inner is not module}


def count_owners(model: nn.Module) -> Counter[int]:
    """In how many places of ``model`` each module stands, by its id."""
    places = (child for module in model.modules() for child in module._modules.values())
    return Counter(id(child) for child in places if child is not None)


class _Skeleton:
    """A copy of a model's structure without its data: what tracing does to it cannot harm the model."""

    def __init__(self, model: nn.Module, training: bool) -> None:
        self._tensors: dict[int, Tensor] = {}
        self.copy_of: dict[int, nn.Module] = {}
        self.original_of: dict[int, nn.Module] = {}
        originals = list(model.modules())
        for original in originals:
            scripted = isinstance(original, (torch.jit.ScriptModule, torch.jit.RecursiveScriptModule))
            copy = original if scripted else original.__class__.__new__(original.__class__)
            self.copy_of[id(original)] = copy
            self.original_of[id(copy)] = original
        for original in originals:
            copy = self.copy_of[id(original)]
            if copy is not original:
                copy.__dict__.update({k: self._attribute(v) for k, v in original.__dict__.items()})
                for name in ("_parameters", "_buffers"):
                    tensors = original.__dict__[name].items()
                    copy.__dict__[name] = {key: self._without_data(tensor) for key, tensor in tensors}
                copy.__dict__["_modules"] = {
                    key: None if child is None else self.copy_of[id(child)]
                    for key, child in original._modules.items()
                }
                for name in HOOKS:
                    copy.__dict__[name] = OrderedDict()
                copy.__dict__["training"] = training

    def _without_data(self, tensor: Tensor | None) -> Tensor | None:
        if type(tensor) not in (Tensor, nn.Parameter):
            return tensor
        if id(tensor) not in self._tensors:
            empty = torch.empty_like(tensor, device="meta", requires_grad=False)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            self._tensors[id(tensor)] = empty
        return self._tensors[id(tensor)]

    def _attribute(self, value: Any) -> Any:
        """Containers are copied, and what refers to a module of the model refers to the copy's."""
        if isinstance(value, nn.Module):
            return self.copy_of.get(id(value), value)
        if inspect.ismethod(value) and id(value.__self__) in self.copy_of:
            return types.MethodType(value.__func__, self.copy_of[id(value.__self__)])
        if type(value) in (list, tuple, set):
            return type(value)(self._attribute(entry) for entry in value)
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._attribute(entry)) for key, entry in value.items())
        return value


class _Tracer(fx.Tracer):
    """Traces what it can: a module whose forward does not trace becomes one node, listed in ``opaque``.

    Modules of the classes named in ``whole`` are one node too.
    """

    def __init__(self, whole: Set[str]) -> None:
        super().__init__()
        self.whole = whole
        self.opaque: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if next(m.children(), None) is None or is_norm(m) or is_fused(m) or type_name(m) in self.whole:
            return True
        stock = m.__module__.startswith(("torch.nn.", "torch.ao.")) and not isinstance(m, nn.Sequential)
        return stock or isinstance(m, torch.jit.ScriptModule)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        before = next(iter(reversed(self.graph.nodes)), None)
        stack = list(self.module_stack.items())
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.module_stack.clear()
            self.module_stack.update(stack)
            for node in reversed(self.graph.nodes):
                if node is before:
                    break
                # The tracer remembers parameters that it has fetched.
                if node.op != "get_attr":
                    self.graph.erase_node(node)
            self.opaque.append(m)
            return self.create_proxy("call_module", path, args, kwargs)


def _driver(count: int) -> type[nn.Module]:
    """A module that calls another with ``count`` arguments, the rest by default."""
    calls = (
        lambda self: self.results(self.module()),
        lambda self, a: self.results(self.module(a)),
        lambda self, a, b: self.results(self.module(a, b)),
        lambda self, a, b, c: self.results(self.module(a, b, c)),
        lambda self, a, b, c, d: self.results(self.module(a, b, c, d)),
    )

    class Driver(nn.Module):
        forward = calls[count]

        def results(self, value: Any) -> list[fx.Proxy]:
            leaves = tree_leaves(value)
            known = (fx.Proxy, Tensor, int, float, str, type(None))
            if any(not isinstance(leaf, known) for leaf in leaves):
                raise TypeError("an output may hold tensors that cannot be seen")
            return [leaf for leaf in leaves if isinstance(leaf, fx.Proxy)]

    return Driver


def _count_arguments(module: nn.Module) -> int:
    parameters = inspect.signature(module.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)
    return max(required, int(any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)))


# What may be asked of a tensor without using its values; the same for every tensor of a chain.
_METADATA = ("shape", "dtype", "device", "ndim", "size", "dim")


def reads_metadata(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _METADATA
    return node.op == "call_method" and node.target in _METADATA


SUMS = (operator.add, torch.add, "add")
# In place, into the tensor on the left.
SUMS_INTO = (operator.iadd, "add_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")


def _operands(node: fx.Node) -> list[fx.Node]:
    return [arg for arg in node.args if isinstance(arg, fx.Node)]


def _is_sum_with_another(node: fx.Node, one: fx.Node) -> bool:
    operands = _operands(node)
    if len(node.args) != 2 or len(set(operands)) != 2:
        return False
    return node.target in SUMS or (node.target in SUMS_INTO and operands[0] is one)


def _is_product_or_permutation(node: fx.Node) -> bool:
    if node.op == "call_method" and node.target == "permute":
        return True
    operands = _operands(node)
    return node.target in _PRODUCTS and len(node.args) == 2 and len(set(operands)) == 2


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave random states as they were."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)


def _original(driver: nn.Module, skeleton: _Skeleton, node: fx.Node) -> nn.Module | None:
    """The module that ``node`` calls, of the model that ``skeleton`` is a copy of."""
    return skeleton.original_of[id(driver.get_submodule(node.target))] if node.op == "call_module" else None


def _kept_nodes(root: nn.Module) -> set[int]:
    """Ids of the nodes whose values a trace of ``root`` left in attributes of its modules."""
    values = (value for module in root.modules() for value in tree_leaves(list(module.__dict__.values())))
    return {id(value.node) for value in values if isinstance(value, fx.Proxy)}


def _trace(root: nn.Module, skeleton: _Skeleton, flow: Flow) -> list[nn.Module]:
    """Add the calls inside ``root`` (of the skeleton) to ``flow``; the modules that did not trace."""
    tracer = _Tracer(flow.whole)
    try:
        driver = _driver(_count_arguments(root))()
        driver.module = root
        with _undisturbed():
            graph = tracer.trace(driver)
    except Exception:
        return [root]

    module_of = partial(_original, driver, skeleton)
    kept = _kept_nodes(root)

    def any_user(node: fx.Node) -> fx.Node | None:
        users = [user for user in node.users if not reads_metadata(user)]
        return users[0] if len(users) == 1 and id(node) not in kept else None

    def only_user(node: fx.Node) -> fx.Node | None:
        user = any_user(node)
        return user if user is not None and takes_first(user, node) else None

    def takes_first(user: fx.Node, node: fx.Node) -> bool:
        """Whether a module gets ``node`` as its first argument, and nowhere else."""
        others = tree_leaves((user.args[1:], user.kwargs))
        return user.op == "call_module" and user.args[:1] == (node,) and node not in others

    def scaled(node: fx.Node) -> tuple[nn.Module | None, nn.Module | None]:
        """``then`` and ``adder`` of a call."""
        while (user := any_user(node)) is not None and not user.kwargs:
            if user.op == "call_module":
                return (module_of(user) if takes_first(user, node) else None), None
            if _is_sum_with_another(user, node):
                # Where the tracer was, as the innermost module that it was in.
                path, _ = next(reversed(user.meta.get("nn_module_stack", {}).values()), (None, None))
                return None, None if path is None else skeleton.original_of[id(driver.get_submodule(path))]
            if not _is_product_or_permutation(user):
                break
            node = user
        return None, None

    for node in graph.nodes:
        module = module_of(node)
        if module is None:
            continue
        source = node.args[0] if node.args else None
        alone = isinstance(source, fx.Node) and only_user(source) is node
        user = only_user(node)
        producer, consumer = module_of(source) if alone else None, None if user is None else module_of(user)
        call = _Call(producer, consumer, *scaled(node))
        flow.calls.setdefault(id(module), []).append(call)
    return tracer.opaque


# Of a forward to itself, before it is given up; twice as many graphs for each.
_MOST_QUESTIONS = 4


class _Caller(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Any) -> Any:
        return self.module(x)


class _Proxy(fx.Proxy):
    """Tells ``x += y`` from ``x + y``, which other proxies do not."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _BranchTracer(_Tracer):
    """Answers a forward's own questions (``if x.shape[2] % 2``) by ``answers``, further ones with yes."""

    def __init__(self, whole: Set[str], answers: tuple[bool, ...]) -> None:
        super().__init__(whole)
        self.answers = answers
        self.asked = 0

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if self.asked == len(self.answers):
            self.answers += (True,)
        self.asked += 1
        if self.asked > _MOST_QUESTIONS:
            raise fx.proxy.TraceError("too many questions, or a loop")
        return self.answers[self.asked - 1]


def _attributes(root: nn.Module) -> list[tuple[int, str, int, int]]:
    """What a forward would change by setting attributes of modules, or adding to containers in them."""
    return [
        (id(module), name, id(value), len(value) if isinstance(value, list | dict | set) else 0)
        for module in root.modules()
        for name, value in module.__dict__.items()
    ]


def graphs_of(
    root: nn.Module, whole: Set[str]
) -> list[tuple[fx.Graph, Callable[[fx.Node], nn.Module | None]]]:
    """Everything that the forward of ``root`` may do with one argument: a graph per mode and branch.

    A graph's output is what the forward returns, as it returns it.

    Returns:
        Graphs, each with a function that gives a node's module in ``root``. None at all where the forward
        does not trace, in one mode or branch, or changes an attribute, whatever for.
    """
    found = []
    for training in (True, False):
        open_answers: list[tuple[bool, ...]] = [()]
        while open_answers:
            given = open_answers.pop()
            skeleton = _Skeleton(root, training)
            tracer = _BranchTracer(whole, given)
            driver = _Caller(skeleton.copy_of[id(root)])
            before = _attributes(driver)
            try:
                with _undisturbed():
                    graph = tracer.trace(driver)
            except Exception:
                return []
            if tracer.opaque or _attributes(driver) != before:
                return []
            found.append((graph, partial(_original, driver, skeleton)))
            questions = range(len(given), len(tracer.answers))
            open_answers += [(*tracer.answers[:number], False) for number in questions]
    return found


def _handling(module: nn.Module) -> tuple[set[str], set[str]] | None:
    """How a class's code handles attributes; None where its source cannot be had.

    What runs while the module is made, and not when it is called, does not count.

    Returns:
        Names taken from objects other than ``self``, and names taken from ``self`` for more than a call.
    """
    reached: set[str] = set()
    uncalled: set[str] = set()
    methods: dict[str, list[ast.FunctionDef]] = {}
    for cls in type(module).__mro__:
        if cls in (nn.Module, object):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):
            return None
        for method in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            methods.setdefault(method.name, []).append(method)
    making = _methods_used("__init__", methods) - _methods_used("forward", methods)
    for method in (method for name in methods.keys() - making for method in methods[name]):
        called = {id(node.func) for node in ast.walk(method) if isinstance(node, ast.Call)}
        for node in ast.walk(method):
            if not isinstance(node, ast.Attribute):
                continue
            if not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                reached.add(node.attr)
            elif id(node) not in called:
                uncalled.add(node.attr)
    return reached, uncalled


def _methods_used(first: str, methods: dict[str, list[ast.FunctionDef]]) -> set[str]:
    """``first`` and what it names among ``methods``, and what that names, and so on."""
    used: set[str] = set()
    names = {first}
    while names:
        used |= names
        nodes = [node for name in names for method in methods.get(name, ()) for node in ast.walk(method)]
        names = ({node.attr for node in nodes if isinstance(node, ast.Attribute)} & methods.keys()) - used
    return used


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _follow(root: nn.Module, skeleton: _Skeleton, flow: Flow, seen: set[int], reached: set[str]) -> None:
    """Trace ``root``, and on their own the children of every module inside it that does not trace.

    ``reached`` holds the names that code which cannot be followed takes from inside other modules.
    """
    if id(root) in seen:
        return
    seen.add(id(root))
    for name, module in root.named_modules():
        if name.rpartition(".")[2] in reached:
            flow.unknown.add(id(skeleton.original_of[id(module)]))
    # Outer ones first: what their code reaches for holds for everything inside.
    for opaque in reversed(_trace(root, skeleton, flow)):
        if opaque is not root and id(opaque) in seen:
            continue
        seen.add(id(opaque))
        handling = _handling(opaque)
        further, uncalled = handling or (set(), set())
        _children(opaque, opaque, handling is not None, reached | further, uncalled, skeleton, flow, seen)


def _children(
    holder: nn.Module,
    opaque: nn.Module,
    readable: bool,
    reached: set[str],
    uncalled: set[str],
    skeleton: _Skeleton,
    flow: Flow,
    seen: set[int],
) -> None:
    """Trace the children of ``holder``, whose calls are up to the code of ``opaque``."""
    for name, child in holder.named_children():
        # A list of modules is not called as one, and a Sequential may be taken apart.
        taken_apart = type(child) in (nn.ModuleList, nn.ModuleDict)
        if _is_sequence(child):
            taken_apart = holder is not opaque or not readable or name in uncalled
        if taken_apart:
            _children(child, opaque, readable, reached, uncalled, skeleton, flow, seen)
        elif next(child.children(), None) is None or is_norm(child):
            for module in child.modules():
                flow.unknown.add(id(skeleton.original_of[id(module)]))
        elif readable:
            _follow(child, skeleton, flow, seen, reached)
        else:
            for module in child.modules():
                flow.unknown.add(id(skeleton.original_of[id(module)]))


def data_flow(model: nn.Module, whole: Set[str]) -> Flow:
    """The flow between the modules of ``model``; those of the classes named in ``whole`` count as one."""
    flow = Flow(whole)
    # What a forward does may depend on the mode, and a chain must hold in both.
    for training in (True, False):
        skeleton = _Skeleton(model, training)
        _follow(skeleton.copy_of[id(model)], skeleton, flow, set(), set())
    return flow
