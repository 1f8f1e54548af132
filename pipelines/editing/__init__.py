"""Editing: steering baked into the weights of a model, where weights can hold it exactly, with an undo."""
