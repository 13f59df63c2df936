"""Triton kernels of the linear-attention ops (`<op>_kernels.py`) and their launchers (`<op>.py`), imported when first called."""
