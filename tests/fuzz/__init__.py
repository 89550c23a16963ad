"""Hostile and odd input by the ten thousand: `make fuzz FUZZ=100000 SEED=0`.

Every file format and the command line itself, mutated and made up, go through every command, in process and bounded in
time and memory. An input is a seed and a number, so that what was found is run again by `--only`.
"""
