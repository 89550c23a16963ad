"""Shared by all tests: two threads."""

import torch
from hypothesis import settings

torch.set_num_threads(2)
settings.register_profile("mpq", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("mpq")
