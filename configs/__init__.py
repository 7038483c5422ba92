"""Experiments: `base` declares every key, the others are small changes to it."""
