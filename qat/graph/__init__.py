"""Tracing, naming, operators, planning and preparation: graph in, graph out."""
