"""CUDA kernels of the backend "cupy", compiled on first use."""
