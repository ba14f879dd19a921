"""Virtual devices: capped arenas in host memory, computed by the CPU kernels."""
