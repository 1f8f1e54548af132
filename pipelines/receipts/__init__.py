"""Receipts: scorers of labels, and the controls that keep their scores honest. One file a scorer family or control."""
