"""Data sets in shards on disk, and batches made ahead of their use."""
