"""RAC-LoRA: a chain of adapters, of each of which one factor is random and frozen.

Paper: Malinovsky, Michieli, Hammoud, Ceritli, Elesedy, Ozay, Richtarik, "Randomized asymmetric chain of LoRA:
    The first meaningful theoretical framework for low-rank adaptation", arXiv 2410.08305.
What this file computes: which slots of one wide pair a step of the chain trains.
Symbols: block = the slots of one adapter of the chain.
Differences from the authors' code: nothing is merged into the base, which may be quantised: block t is slots
    t h to (t + 1) h of a pair, those before are frozen, and the sum of all is an ordinary adapter. The trained factor
    is the one that starts from zero, only it is trained (their script trains both), and the
    optimizer starts anew with every block.
"""


def block_of(step: int, steps_per_block: int, blocks: int) -> int:
    """The block that a step (counted from 0) trains; the last one goes on for ever."""
    return min(step // steps_per_block, blocks - 1)


def slots_of(block: int, blocks: int, r: int) -> tuple[int, int]:
    """First slot of a block, and the one after its last; r slots are split as evenly as can be."""
    return r * block // blocks, r * (block + 1) // blocks
