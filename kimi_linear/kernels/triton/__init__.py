"""Portable Triton kernels: they use no feature of one architecture, and are measured on sm_90. Three spill registers in bf16: see docs/LOG.md."""
