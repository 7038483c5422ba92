"""Searches as their papers describe them, with lists, one text at a time, and no cache; for tests."""

import numpy as np


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def beam_search(next_logprobs, prompt, count, end, beams, groups=1, diversity=0.0, length_penalty=1.0, early=False):
    """[(new tokens with end-of-text, score)], the best first.

    `next_logprobs` maps a list of tokens to log-probabilities of the next one; `beams` is that of a group.
    """
    # Of each group: open texts as (score, new tokens), and ended ones as (normalized score, new tokens).
    open_, ended, over = [[(0.0, [])] for _ in range(groups)], [[] for _ in range(groups)], [False] * groups
    for step in range(1, count + 1):
        taken = {}
        for group in range(groups):
            if over[group]:
                continue
            candidates = []
            for score, new in open_[group]:
                for token, logprob in enumerate(next_logprobs(prompt + new)):
                    candidates.append((score + logprob - diversity * taken.get(token, 0), [*new, token]))
            candidates.sort(key=lambda candidate: -candidate[0])
            for score, new in candidates[:beams]:
                if new[-1] == end or step == count:
                    ended[group].append((score / step**length_penalty, new))
            ended[group] = sorted(ended[group], key=lambda text: -text[0])[:beams]
            open_[group] = [(score, new) for score, new in candidates if new[-1] != end][:beams]
            for _, new in open_[group]:
                taken[new[-1]] = taken.get(new[-1], 0) + 1
            if len(ended[group]) == beams:
                hoped = count if early == 'never' and length_penalty > 0 else step
                cannot_improve = open_[group][0][0] / hoped**length_penalty <= ended[group][-1][0]
                over[group] = early is True or cannot_improve
        if all(over):
            break
    return sorted(((new, score) for group in ended for score, new in group), key=lambda text: -text[1])


def contrastive_search(forward, prompt, count, end, alpha, top_k):
    """New tokens with end-of-text; `forward` maps a list of tokens to (log-probabilities, hidden states) of each."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] != end):
        logprobs, hidden = forward(tokens)
        hidden = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
        scores = {}
        for token in np.argsort(-logprobs[-1], kind='stable')[:top_k]:
            state = forward([*tokens, int(token)])[1][-1]
            likeness = (hidden @ (state / np.linalg.norm(state))).max()
            scores[int(token)] = (1 - alpha) * np.exp(logprobs[-1][token]) - alpha * likeness
        tokens.append(max(scores, key=scores.get))
    return tokens[len(prompt) :]
