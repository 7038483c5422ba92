"""Padded lengths: few of them, so that a session compiles few programs."""

SMALLEST = 32
# Beyond this length powers of two would waste more time on padding than a program takes to compile.
FINE_FROM, STEPS_AN_OCTAVE = 256, 8
SMALLEST_STEP = 64


def bucket(length: int, most: int | None = None) -> int:
    """The least of 32, 64, 128, 256, 320, 384, ... 1024, 1152, ... that holds `length` tokens, or `most` if it is less.

    Above 256 the steps are 64, and from 1024 on an eighth of the last power of two: at most a fifth is padding.
    """
    size = SMALLEST
    while size < length:
        size += size if size < FINE_FROM else max(SMALLEST_STEP, (1 << (size.bit_length() - 1)) // STEPS_AN_OCTAVE)
    return size if most is None else min(size, most)


def batch_bucket(rows: int, multiple: int = 1) -> int:
    """The least power of two times `multiple` (devices that split the batch) that holds `rows` sequences."""
    size = multiple
    while size < rows:
        size *= 2
    return size
