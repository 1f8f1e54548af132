"""The alignment guard: features watched while a model writes, at thresholds learned on labelled texts."""
