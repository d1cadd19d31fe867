"""Portable Triton kernels: they use no feature of one architecture, are measured on sm_90, and in bf16 free of spills on sm_90 and sm_100."""
