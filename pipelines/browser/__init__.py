"""The feature browser, `saeql serve`: pages and an API over one store, and the run's model where something asks it."""
