"""Dispatch: the choice of a backend, its explanation, the measured order, and the cache of prepared calls."""
