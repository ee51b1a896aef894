"""Rows to train on in tests: a second of training learns them."""

from typing import Any

import numpy as np
import torch

WORDS = [
    *(
        "the",
        "a",
        "good",
        "fine",
        "great",
        "bad",
        "poor",
        "awful",
        "film",
        "plot",
        "actor",
        "music",
    ),
    *("is", "was", "very", "not", "and"),
]
KINDS = {"film": "B-ART", "plot": "B-ART", "actor": "B-MAN", "music": "B-ART"}


def reviews(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Made-up reviews whose label is what their adjectives say."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    result = []
    for _ in range(rows):
        label = pick(["good", "bad"])
        adjectives = WORDS[2:5] if label == "good" else WORDS[5:8]
        text = f"the {pick(WORDS[8:12])} was {pick(['very', 'not', 'a'])} {pick(adjectives)}"
        other = f"{pick(WORDS[8:12])} is {pick(adjectives)}"
        result.append(
            {"text": text, "other": other, "label": label, "score": float(label == "good")}
        )
    return result


def sentences(count: int, seed: int) -> list[dict]:
    """Four nouns are entities, and a `good` that follows one belongs to it."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        size = int(torch.randint(3, 12, (), generator=generator))
        words = [WORDS[i] for i in torch.randint(len(WORDS), (size,), generator=generator).tolist()]
        tags = [KINDS.get(word, "O") for word in words]
        for place in range(1, len(words)):
            if words[place] == "good" and words[place - 1] in KINDS:
                tags[place] = "I" + tags[place - 1][1:]
        rows.append({"words": words, "tags": tags})
    return rows


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, brighter in its upper (0) or lower (1) half."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    images = random.integers(0, 100, (count, 16, 16, 3))
    for image, label in zip(images, labels, strict=True):
        image[:8] += 100 * (label == 0)
        image[8:] += 100 * (label == 1)
    return images.astype(np.uint8), labels


def sums(count: int, seed: int) -> list[dict[str, str]]:
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(0, 3, (count, 2), generator=generator).tolist()
    return [{"question": f"{a} + {b} =", "answer": f"the film is #### {a + b}"} for a, b in pairs]
