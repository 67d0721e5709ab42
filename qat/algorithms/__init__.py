"""Post-training algorithms: each a function of a prepared model."""
