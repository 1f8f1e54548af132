"""Language models that explain and judge: an endpoint or a local model behind one interface."""
