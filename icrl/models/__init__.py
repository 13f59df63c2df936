"""What the models of both papers are made of: token mixers and their states, stacks of blocks, tokenizers. It knows no task."""
