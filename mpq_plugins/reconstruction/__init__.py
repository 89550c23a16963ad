"""Reconstruction: integer codes learned block by block, so that a quantized model computes what the float one did."""
