"""NVIDIA GPUs: Triton kernels over torch's memory. Nothing here imports torch or triton before a GPU is used."""
