"""Looking at what quantization does to a model."""
