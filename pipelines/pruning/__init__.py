"""Pruning guided by features: MLP neurons and attention heads that chosen features do not need are taken out."""
