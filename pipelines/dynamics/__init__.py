"""Training dynamics: features of one recipe over checkpoints of a model, and a crosscoder over its ends."""
