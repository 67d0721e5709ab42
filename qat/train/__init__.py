"""Training and evaluation: data sets, the plain training loop, checkpoints."""
