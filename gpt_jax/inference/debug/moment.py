"""One choice of a token, with all that led to it."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Moment:
    """The next token before it is taken.

    Attributes:
      names: of the distributions: the model's, then after each filter.
      logprobs_SV: their log-probabilities in nats, float64 [len(names), vocab]; -inf: dropped.
      chosen: the token that was drawn, or is the likeliest.
    """

    names: tuple[str, ...]
    logprobs_SV: np.ndarray
    chosen: int

    @property
    def probabilities(self) -> np.ndarray:
        """[len(names), vocab]."""
        return np.exp(self.logprobs_SV)

    @property
    def entropies(self) -> np.ndarray:
        """Entropy of each distribution, in nats."""
        return entropy(self.logprobs_SV)

    @property
    def kept(self) -> np.ndarray:
        """How many tokens each distribution has left."""
        return np.isfinite(self.logprobs_SV).sum(axis=-1)

    def rank(self, token: int) -> int:
        """1 for the token that the model finds likeliest; of equals the lower id comes first."""
        return rank(self.logprobs_SV[0], token)


def log_softmax(logits_V: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64, over the last axis."""
    logits_V = np.asarray(logits_V, np.float64)
    logits_V = logits_V - logits_V.max(axis=-1, keepdims=True)
    return logits_V - np.log(np.exp(logits_V).sum(axis=-1, keepdims=True))


def entropy(logprobs_V: np.ndarray) -> np.ndarray:
    """-sum p log p in nats, over the last axis; what was dropped adds nothing."""
    return -(np.exp(logprobs_V) * np.where(np.isfinite(logprobs_V), logprobs_V, 0.0)).sum(axis=-1)


def rank(scores_V: np.ndarray, token: int) -> int:
    """The place of `token`, from 1, in descending order of scores; of equals the lower id comes first."""
    return 1 + int((scores_V > scores_V[token]).sum()) + int((scores_V[:token] == scores_V[token]).sum())


def likeliest(scores_V: np.ndarray, count: int) -> np.ndarray:
    """The `count` ids of the highest scores, in that order."""
    return np.argsort(-scores_V, kind='stable')[:count]
