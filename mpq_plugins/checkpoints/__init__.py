"""Tensors in files, read a few rows at a time. No pickle is executed."""
