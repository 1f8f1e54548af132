"""The feature browser as plain files, `saeql export RUN --format site`: any host serves them, nothing computes."""
