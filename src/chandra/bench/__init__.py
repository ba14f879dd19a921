"""Measurements of a machine with the real kernels: `python -m chandra.bench gpu --out FOLDER`."""
