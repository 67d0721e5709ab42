"""Export of a converted network (a `Program`) to deployment formats, with proof by execution."""
