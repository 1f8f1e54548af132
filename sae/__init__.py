"""Dictionaries of features: architectures, objective, metrics, stream, trainer, checkpoints and hooks."""
