"""Foreign tables of encodings and configurations: one file a system."""
