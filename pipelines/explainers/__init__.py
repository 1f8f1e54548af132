"""Explainers: what proposes labels for features. One file an explainer, all behind `base.Explainer`."""
