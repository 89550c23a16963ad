"""Tensor to codes and back."""
