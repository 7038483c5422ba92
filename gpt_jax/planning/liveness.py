"""How much memory a traced function holds at its worst moment, read from its jaxpr without compiling it.

The equations are walked in order: a value takes its bytes from the one that makes it to the last one that reads it.
What every XLA backend does is counted in: chains of elementwise equations are fused, so that a value which only
another one of them reads is never stored, and an elementwise result is written over an operand that dies.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core

# Fused into the one equation that reads them.
ELEMENTWISE = frozenset(
    'abs add add_any and broadcast_in_dim clamp convert_element_type copy cos div eq erf exp exp2 ge gt integer_pow '
    'iota is_finite le log log1p logistic lt max min mul name ne neg not optimization_barrier or pow rsqrt select_n '
    'sign sin sqrt square sub tanh'.split()
)
EXPENSIVE = frozenset('cos div erf exp exp2 log log1p logistic pow rsqrt sin sqrt tanh'.split())
# They store their result, but take in a fused operand.
REDUCTIONS = frozenset('reduce_sum reduce_max reduce_min reduce_and reduce_or argmax'.split())
# The same bytes under another shape.
VIEWS = frozenset('reshape squeeze expand_dims stop_gradient'.split())
# A function inside a function: its equations stand in the outer one's place.
CALLS = frozenset('jit pjit closed_call core_call custom_jvp_call custom_vjp_call checkpoint remat2 remat'.split())


@dataclasses.dataclass
class _Node:
    """One equation: the values that it reads and makes, by number, and what it holds inside while it runs."""

    name: str
    reads: list[int]
    makes: list[int]
    inside: int


def array_bytes(tree: Any) -> int:
    """Bytes of all arrays, or abstract arrays, of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def peak_bytes(jaxpr: Any) -> int:
    """Bytes that the equations of a (closed) jaxpr hold at once at most; its inputs are the caller's."""
    graph = _Graph()
    jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
    numbers = {var: graph.value(None) for var in (*jaxpr.invars, *jaxpr.constvars)}
    graph.add(jaxpr, numbers)
    return graph.peak([numbers[var] for var in jaxpr.outvars if isinstance(var, core.Var)])


class _Graph:
    """The equations of a jaxpr and of the functions called in it, in one list."""

    def __init__(self):
        self._bytes: list[int | None] = []  # None: an input, not ours to count
        self._nodes: list[_Node] = []

    def value(self, size: int | None) -> int:
        self._bytes.append(size)
        return len(self._bytes) - 1

    def add(self, jaxpr: Any, numbers: dict[Any, int]) -> None:
        """Appends the equations of `jaxpr`, whose inputs have `numbers`; adds the numbers of what they make."""
        for equation in jaxpr.eqns:
            reads = [numbers[var] for var in equation.invars if isinstance(var, core.Var)]
            inner = _inner(equation)
            if equation.primitive.name in CALLS:
                self._call(inner[0], equation, numbers)
                continue
            makes = [self.value(_aval_bytes(var.aval)) for var in equation.outvars]
            numbers.update(zip(equation.outvars, makes, strict=True))
            inside = max(map(peak_bytes, inner), default=0)
            self._nodes.append(_Node(equation.primitive.name, reads, makes, inside))

    def _call(self, inner: Any, equation: Any, numbers: dict[Any, int]) -> None:
        names = {var: self.value(None) for var in inner.constvars}
        for var, given in zip(inner.invars, equation.invars, strict=True):
            names[var] = numbers[given] if isinstance(given, core.Var) else self.value(None)
        self.add(inner, names)
        for var, result in zip(equation.outvars, inner.outvars, strict=True):
            numbers[var] = names[result] if isinstance(result, core.Var) else self.value(None)

    def peak(self, results: list[int]) -> int:
        readers: dict[int, list[_Node]] = {}
        for node in self._nodes:
            for number in set(node.reads):
                readers.setdefault(number, []).append(node)
        # Of each value the stored ones behind it: itself, or what a fused one was made from.
        behind: list[set[int]] = [set() for _ in self._bytes]
        last: dict[int, int] = {}
        for index, node in enumerate(self._nodes):
            sources = set().union(*(behind[number] for number in node.reads)) if node.reads else set()
            if node.name in VIEWS or self._is_fused(node, readers, results):
                behind[node.makes[0]] = sources
                continue
            for number in node.makes:
                behind[number] = {number}
                last[number] = index
            last.update(dict.fromkeys(sources, index))
        for number in results:
            last.update(dict.fromkeys(behind[number], len(self._nodes)))
        return self._walk(behind, last)

    def _is_fused(self, node: _Node, readers: dict[int, list[_Node]], results: list[int]) -> bool:
        if node.name not in ELEMENTWISE or len(node.makes) != 1 or node.makes[0] in results:
            return False
        if not node.reads:
            return True  # made of nothing: iota, constants
        by = readers.get(node.makes[0], [])
        cheap = len(by) == 1 or node.name not in EXPENSIVE
        return bool(by) and cheap and all(reader.name in ELEMENTWISE | REDUCTIONS for reader in by)

    def _walk(self, behind: list[set[int]], last: dict[int, int]) -> int:
        live, peak = 0, 0
        alive: dict[int, int] = {}
        for index, node in enumerate(self._nodes):
            made = [number for number in node.makes if number in last and behind[number] == {number}]
            if not made:
                continue
            size = sum(self._bytes[number] for number in made)
            dying = [number for number in alive if last[number] == index]
            freed = sum(self._bytes[number] for number in dying)
            reused = min(size, freed) if node.name in ELEMENTWISE else 0
            peak = max(peak, live + size - reused + node.inside)
            alive.update(dict.fromkeys(made))
            live += size - freed
            for number in dying:
                del alive[number]
            for number in made:
                if last[number] == index:
                    del alive[number]
                    live -= self._bytes[number]
        return peak


def _inner(equation: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation: the body of a loop, the branches of a choice."""
    groups = (value if isinstance(value, tuple | list) else (value,) for value in equation.params.values())
    values = (getattr(value, 'jaxpr', value) for group in groups for value in group)
    return [value for value in values if hasattr(value, 'eqns')]


WIDE=False
def _aval_bytes(aval: Any) -> int:
    itemsize = getattr(getattr(aval, 'dtype', None), 'itemsize', 0)
    if WIDE and itemsize==2: itemsize=4
    return math.prod(getattr(aval, 'shape', ())) * itemsize
