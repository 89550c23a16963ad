"""A small trained network and real handwritten digits, so that a first run needs no download."""
