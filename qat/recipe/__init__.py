"""Recipes: the schema, loading with overrides, and the run that a recipe describes."""
