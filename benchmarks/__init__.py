"""Kernels against their floors, XLA and recorded peers: `python3 -m benchmarks`."""
