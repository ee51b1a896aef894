"""Which LoRA pairs a model has, and a pair as a point U, sigma, V."""
