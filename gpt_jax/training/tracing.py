"""A trace of some steps, which TensorBoard's profiler and xprof open: what each device and thread did, and when."""

import pathlib
import re
import tempfile

import jax

from gpt_jax.errors import InputError, printable
from gpt_jax.files import is_address


def parse_steps(text: str) -> tuple[int, int]:
    """'10:15' -> (10, 15), the first and the last step to trace.

    Raises:
      InputError: these are no two numbers in order, from 1.
    """
    found = re.fullmatch(r'(\d{1,9}):(\d{1,9})', text, re.ASCII)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(
            f'--profile={printable(text, 40)} must be START:STOP, the first and the last step, as in 10:15'
        )
    return int(found[1]), int(found[2])


class Trace:
    """Traces the steps from `steps[0]` to `steps[1]`, into WORKDIR/profile; None: none of them."""

    def __init__(self, steps: tuple[int, int] | None, workdir: pathlib.Path):
        self._steps, self._workdir = steps, workdir
        self._place: str | None = None

    def before(self, step: int) -> None:
        """Begins, where `step` is one to trace and is about to be taken."""
        if self._steps is None or self._place is not None or not self._steps[0] <= step <= self._steps[1]:
            return
        # Nothing is written to object storage but whole files.
        local = tempfile.mkdtemp(prefix='gpt_jax-') if is_address(self._workdir) else str(self._workdir / 'profile')
        jax.profiler.start_trace(local)
        self._place = local

    def ends_with(self, step: int) -> bool:
        """Whether `step`, which has been taken, is the last one to trace."""
        return self._place is not None and step == self._steps[1]

    def stop(self) -> str | None:
        """Ends, where it has begun; where the trace is, or None."""
        if self._place is None:
            return None
        local, self._place, self._steps = self._place, None, None
        jax.profiler.stop_trace()
        if not is_address(self._workdir):
            return local
        from gpt_jax import storage

        storage.upload_folder(pathlib.Path(local), self._workdir / 'profile')
        return str(self._workdir / 'profile')
