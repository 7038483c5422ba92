"""How much memory a traced function holds at its worst moment, read from its jaxpr without compiling it.

The equations are walked in order: a value takes its bytes from the one that makes it to the last one that reads it.
What every XLA backend does is counted in: equal equations are one; chains of elementwise equations are fused, so that a
value which only such equations read is not stored (a cheap one is made again for each of them); and an elementwise
result is written over an operand that dies.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Worth storing once where several equations read the result; the other elementwise ones are made again for each.
EXPENSIVE = _names('cos div erf exp exp2 log log1p logistic pow rsqrt sin sqrt tanh')
ELEMENTWISE = EXPENSIVE | _names(
    'abs add add_any and broadcast_in_dim clamp convert_element_type copy eq ge gt integer_pow iota is_finite le lt '
    'max min mul ne neg not or select_n sign square sub'
)
# They take in what is fused, but store their own result.
REDUCTIONS = _names('reduce_sum reduce_max reduce_min reduce_and reduce_or argmax')
# The same bytes: under another shape or name, or held back from being merged.
VIEWS = _names('expand_dims name optimization_barrier reshape squeeze stop_gradient')
# A function inside the function: its equations stand in the outer one's place.
CALLS = _names('checkpoint closed_call core_call custom_jvp_call custom_vjp_call jit pjit remat remat2')


@dataclasses.dataclass
class _Node:
    """One equation: the values that it reads and makes, by number, and what it holds inside while it runs."""

    name: str
    reads: list[int]
    makes: list[int]
    inside: int


class Liveness:
    """The equations of a jaxpr and of the functions called in it.

    Args:
      jaxpr: of the function (closed or not). Its inputs are the caller's, and not counted.
      cpu: count as XLA's CPU backend does: it holds numbers of 16 bits as 32, and merges what rematerialisation makes
        again with what was made before, unless a loop lies between them.
    """

    def __init__(self, jaxpr: Any, cpu: bool = False):
        self._cpu = cpu
        self._bytes: list[int] = []
        self._nodes: list[_Node] = []
        self._known: dict[Any, list[int]] = {}
        jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
        self._inputs = [self._value(0) for _ in jaxpr.invars]
        numbers = dict(zip(jaxpr.invars, self._inputs, strict=True))
        numbers |= {var: self._value(0) for var in jaxpr.constvars}
        self._results = self._add(jaxpr, numbers)
        self._behind, self._last = self._lifetimes()

    def peak(self) -> int:
        """Bytes held at once at most."""
        live, peak, alive = 0, 0, set()
        for index, node in enumerate(self._nodes):
            made = [number for number in node.makes if self._behind[number] == {number}]
            if not made:
                continue
            size = sum(self._bytes[number] for number in made)
            dying = {number for number in alive if self._last[number] == index}
            freed = sum(self._bytes[number] for number in dying)
            peak = max(peak, live + size + node.inside - (min(size, freed) if node.name in ELEMENTWISE else 0))
            unread = {number for number in made if self._last[number] == index}
            alive = (alive | set(made)) - dying - unread
            live += size - freed - sum(self._bytes[number] for number in unread)
        return peak

    def results(self) -> int:
        """Bytes of the results; one that is an input itself, or the same as another, counts nothing."""
        return sum(self._bytes[number] for number in set(self._results))

    def _value(self, size: int) -> int:
        self._bytes.append(size)
        return len(self._bytes) - 1

    def _size(self, aval: Any) -> int:
        itemsize = getattr(getattr(aval, 'dtype', None), 'itemsize', 0)
        return math.prod(getattr(aval, 'shape', ())) * (4 if self._cpu and itemsize == 2 else itemsize)

    def _add(self, jaxpr: Any, numbers: dict[Any, int], barrier: int = 0) -> list[int]:
        """Takes in the equations of `jaxpr`, whose inputs have `numbers`; the numbers of its results."""
        for equation in jaxpr.eqns:
            inner = _inner(equation)
            given = [numbers[var] if isinstance(var, core.Var) else self._constant(var) for var in equation.invars]
            if equation.primitive.name in CALLS:
                called = inner[0]
                names = dict(zip(called.invars, given, strict=True)) | {var: self._value(0) for var in called.constvars}
                made = self._add(called, names, len(self._nodes) if self._is_barrier(equation) else barrier)
            else:
                made = self._equation(equation, given, inner, barrier)
            numbers.update(zip(equation.outvars, made, strict=True))
        return [numbers[var] if isinstance(var, core.Var) else self._constant(var) for var in jaxpr.outvars]

    def _equation(self, equation: Any, given: list[int], inner: list[Any], barrier: int) -> list[int]:
        """One equation, or what an equal one on the same side of the last `barrier` made."""
        key = (equation.primitive.name, tuple(given), str(equation.params), barrier)
        if not inner and key in self._known:
            return self._known[key]
        made = [self._value(self._size(var.aval)) for var in equation.outvars]
        inside = max((Liveness(one, self._cpu).peak() for one in inner), default=0)
        self._nodes.append(_Node(equation.primitive.name, given, made, inside))
        self._known[key] = made
        return made

    def _is_barrier(self, equation: Any) -> bool:
        """Whether what is made again here may not be merged with what was made before (jax.checkpoint)."""
        flags = (equation.params.get(key, False) for key in ('differentiated', 'prevent_cse'))
        return all(flags) and not self._cpu

    def _constant(self, literal: Any) -> int:
        key = ('literal', str(literal.val), str(literal.aval))
        if key not in self._known:
            self._known[key] = [self._value(0)]
        return self._known[key][0]

    def _lifetimes(self) -> tuple[list[set[int]], dict[int, int]]:
        """Of each value the stored ones behind it (itself, or what a fused one is made from); the last use of each."""
        readers: dict[int, list[_Node]] = {}
        for node in self._nodes:
            for number in set(node.reads):
                readers.setdefault(number, []).append(node)
        behind: list[set[int]] = [set() for _ in self._bytes]
        last: dict[int, int] = {}
        for index, node in enumerate(self._nodes):
            sources = set().union(*(behind[number] for number in node.reads))
            last.update(dict.fromkeys(sources, index))
            if node.name in VIEWS:
                for read, made in zip(node.reads, node.makes, strict=True):
                    behind[made] = behind[read]
            elif self._is_fused(node, readers):
                behind[node.makes[0]] = sources
            else:
                for number in node.makes:
                    behind[number], last[number] = {number}, index
        for number in self._results:
            last.update(dict.fromkeys(behind[number], len(self._nodes)))
        return behind, last

    def _is_fused(self, node: _Node, readers: dict[int, list[_Node]]) -> bool:
        if node.name not in ELEMENTWISE or node.makes[0] in self._results:
            return False
        by = readers.get(node.makes[0], [])
        shared = len(by) > 1 and node.name in EXPENSIVE
        return bool(by) and not shared and all(reader.name in ELEMENTWISE | REDUCTIONS for reader in by)


def array_bytes(tree: Any) -> int:
    """Bytes of all arrays, or abstract arrays, of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _inner(equation: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation: the body of a loop, the branches of a choice."""
    groups = (value if isinstance(value, tuple | list) else (value,) for value in equation.params.values())
    values = (getattr(value, 'jaxpr', value) for group in groups for value in group)
    return [value for value in values if hasattr(value, 'eqns')]
