"""In-context learning from offline data: S-ICQL (arXiv 2506.01299) and its rivals."""
