"""Cost tiers of controls; a tier runs the controls of those before it too."""

TIERS = ("fast", "full", "paper")
