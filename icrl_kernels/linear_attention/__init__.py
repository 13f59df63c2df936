"""Chunkwise linear attention: an op a file (reference, public functions, declaration); `op.py` has what all of them share."""
