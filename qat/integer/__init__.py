"""The converted model: integer execution, exact to a numerics profile."""
