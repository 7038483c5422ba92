"""What a traced function holds and multiplies, read from its jaxpr and those nested in it."""

import math


def equations(jaxpr):
    """Every equation of a (closed) jaxpr, those inside scans, calls and custom gradients included."""
    for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
        yield equation
        for nested in _nested(equation):
            yield from equations(nested)


def largest_array(jaxpr) -> int:
    """Elements of the largest array that any equation makes."""
    shapes = (out.aval.shape for equation in equations(jaxpr) for out in equation.outvars)
    return max(math.prod(shape) for shape in shapes)


def multiplications(jaxpr) -> int:
    """Scalar products in the matrix multiplications, those in a scan as often as it runs."""
    total = 0
    for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
        if equation.primitive.name == 'dot_general':
            (contracted, _), _ = equation.params['dimension_numbers']
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += depth * math.prod(equation.outvars[0].aval.shape)
        times = equation.params['length'] if equation.primitive.name == 'scan' else 1
        total += times * sum(multiplications(nested) for nested in _nested(equation))
    return total


def _nested(equation):
    for value in equation.params.values():
        for nested in value if isinstance(value, tuple | list) else (value,):
            if hasattr(nested, 'eqns') or hasattr(nested, 'jaxpr'):
                yield nested
