"""Portable Triton kernels: they use no feature of one architecture, and are measured and free of spills from sm_90 on."""
