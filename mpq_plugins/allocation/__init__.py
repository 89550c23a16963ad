"""Allocators: frozen values that turn a LayerTable into a Plan. No torch here."""
