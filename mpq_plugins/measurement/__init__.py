"""Measuring: weights in, a LayerTable out; a model and inputs, sensitivities beside the errors."""
