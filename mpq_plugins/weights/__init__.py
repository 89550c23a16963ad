"""The quantizable weights of a module or a checkpoint: found, named, chosen, read."""
