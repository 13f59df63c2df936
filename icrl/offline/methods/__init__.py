"""S-ICQL and its rivals, a file each."""
