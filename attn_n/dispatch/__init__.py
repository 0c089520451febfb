"""Who serves a call: the choice, its explanation, the measured order, and the calls that are known."""
