"""A plan on a model or a checkpoint in floating point, and the integers that backends store."""
