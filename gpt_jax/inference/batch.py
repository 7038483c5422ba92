"""The host's side of a batch: windows onto texts that outgrow the cache, stop strings, results."""

from collections.abc import Sequence

import jax
import numpy as np

from gpt_jax.inference import loop
from gpt_jax.inference.buckets import bucket
from gpt_jax.inference.engine import Engine, Seen
from gpt_jax.inference.request import Ending, Generation, Request
from gpt_jax.inference.sampling import Sampling


class Batch:
    """A batch of requests on its way.

    Attributes:
      generations: what there is of each continuation.
    """

    # Tokens that a step may write beyond the end of a text.
    slack = 0

    def __init__(self, engine: Engine, requests: Sequence[Request], sampling: Sampling, ending: Ending, seed: int):
        """Begins nothing yet; arguments as of `decode.stream`."""
        self._engine, self._requests, self._ending = engine, requests, ending
        self._chain = sampling.chain(engine.model.config.vocab_size, ending.end_of_text)
        self.generations = [Generation([], [], None) for _ in requests]
        # Rows that fill the batch up are done before they begin.
        extra = engine.batch_size(len(requests)) - len(requests)
        prompts = [request.prompt for request in requests] + [[0]] * extra
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        tokens_BL = np.zeros(
            (len(prompts), bucket(int(lengths_B.max()) + ending.max_new_tokens + self.slack)), np.int32
        )
        for row, prompt in enumerate(prompts):
            tokens_BL[row, : len(prompt)] = prompt
        draws = np.array([request.draw for request in requests] + [(0, 0)] * extra, np.int32)
        self._tokens_BL, self._lengths_B = tokens_BL, lengths_B
        self._starts = [0] * len(prompts)  # where in a text its window begins
        self._done_B = np.array([False] * len(requests) + [True] * extra)
        place = engine.place
        self._state = loop.State(
            seen=None,
            tokens_BL=place(tokens_BL),
            logprobs_BL=place(np.zeros(tokens_BL.shape, np.float32)),
            lengths_B=place(lengths_B),
            prompts_B=place(lengths_B.copy()),
            done_B=place(self._done_B),
            keys_B=loop.row_keys(seed, place(draws)),
        )
        self._free = 0  # slots of the cache

    @property
    def unfinished(self) -> bool:
        """Whether any row goes on."""
        return not self._done_B.all()

    def advance(self, steps: int) -> None:
        """Chooses at most `steps` tokens more for each row, at least one for one of them."""
        ending = self._ending
        rules = (ending.end_of_text, ending.max_new_tokens, self._chain)
        if self._state.seen is None or self._free == 0 or self._full():
            logits_BV, seen = self._prefill()
            self._state = loop.choose_first(self._state.replace(seen=seen), logits_BV, *rules)
            steps -= 1
        if steps:
            self._decode(steps, rules)
        self._collect()

    def _decode(self, steps: int, rules: tuple) -> None:
        model, mesh, params = self._engine.model, self._engine.mesh, self._engine.params
        ran, self._state = loop.decode(model, mesh, params, self._state, min(steps, self._free), *rules)
        self._free -= int(ran)

    def _prefill(self) -> tuple[jax.Array, Seen]:
        """Reads the window of each unfinished text: all of it, or its last half block once it exceeds a block."""
        block_size = self._engine.model.config.block_size
        windows, room = [], 1
        for row, (text, length) in enumerate(zip(self._tokens_BL, self._lengths_B, strict=True)):
            if length - self._starts[row] > block_size:
                self._starts[row] = int(length) - max(1, block_size // 2)
            windows.append([0] if self._done_B[row] else text[self._starts[row] : length])
            if not self._done_B[row]:
                room = max(room, len(self._requests[row].prompt) + self._ending.max_new_tokens - int(length))
        longest = max(map(len, windows))
        room = min(room, block_size - longest)
        self._free = self._engine.slots(longest + room) - longest
        return self._engine.prefill(windows, room)

    def _full(self) -> bool:
        """Whether a row that goes on has no position left."""
        read_B = self._lengths_B - np.array(self._starts) - 1
        return bool(np.any(~self._done_B & (read_B >= self._engine.model.config.block_size)))

    def _collect(self) -> None:
        state, ending = self._state, self._ending
        self._tokens_BL, logprobs_BL, self._lengths_B, done_B = map(
            np.asarray, (state.tokens_BL, state.logprobs_BL, state.lengths_B, state.done_B)
        )
        self._done_B = done_B.copy()
        stopped = False
        for row, generation in enumerate(self.generations):
            if generation.finish_reason is not None:
                continue
            new = slice(len(self._requests[row].prompt), self._lengths_B[row])
            tokens, logprobs = self._tokens_BL[row, new].tolist(), logprobs_BL[row, new].tolist()
            kept, reason = len(tokens), 'length' if done_B[row] else None
            if tokens and tokens[-1] == ending.end_of_text:
                kept, reason = kept - 1, 'stop'
                generation.end_logprob = logprobs[-1]
            stop = None if ending.stop is None else ending.stop(tokens[:kept])
            if stop is not None:
                kept, reason = stop, 'stop'
                stopped |= not done_B[row]
                self._done_B[row] = True
            generation.tokens, generation.logprobs, generation.finish_reason = tokens[:kept], logprobs[:kept], reason
        if stopped:
            self._state = state.replace(done_B=self._engine.place(self._done_B))
