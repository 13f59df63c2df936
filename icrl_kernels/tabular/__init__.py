"""Batched tabular control: packed tables, value iteration, simulation, model-based labels, samplers' kernels."""
