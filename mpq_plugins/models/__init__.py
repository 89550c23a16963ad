"""What a torch module is and does: its layers, its graph, its norms folded, a run, a copy."""
