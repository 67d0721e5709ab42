"""Packages: what one device needs to run a model, with the proof that it computes what was simulated."""
