"""Numerical building blocks: torch only, pure, batched over leading dimensions."""
