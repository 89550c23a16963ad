"""What every part stands on: files, text, checks, plugins. No torch, and nothing of quantization."""
