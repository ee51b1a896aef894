"""What one step of `GeoLoRA` is made of: the long dimension, the small problems, masters, the cycle of ranks."""
