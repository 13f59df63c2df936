"""The training loop: configuration, checkpoints, exact resume. It knows no model."""
