"""Deep Compression (arXiv 1510.00149): prune, share or quantize by a plan, entropy code; one small file."""
