"""Padded sentences with an attention mask, as a tokenizer makes them, and labels of three kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from zoo.case import IGNORED, ZooCase, lively

CLASSES = 3
VOCABULARY = 9  # index 0 is the padding token
LENGTHS = (5, 3, 4, 2, 5, 4, 3)


def sentences(labels: str) -> list[dict[str, Tensor]]:
    """Padded token sequences with a label for the "sequence", each "token" or each "next" token.

    Padding has the label -100.
    """
    width = max(LENGTHS)
    examples = []
    for length in LENGTHS:
        mask = (torch.arange(width) < length).long()
        y = torch.randint(0, CLASSES, ())
        if labels == "token":
            y = torch.randint(0, CLASSES, (width,)).masked_fill(mask == 0, IGNORED)
            y[0] = IGNORED  # as a tokenizer's special token
        if labels == "next":
            y = torch.randint(1, VOCABULARY, (width,)).masked_fill(mask == 0, IGNORED)
        ids = torch.randint(1, VOCABULARY, (width,)) * mask
        examples.append({"input_ids": ids, "attention_mask": mask, "labels": y})
    return examples


def inputs_and_labels(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """A mapping without its labels, and the labels."""
    return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]


def text_case(name: str, model: nn.Module, labels: str, treatment: dict, **options: Any) -> ZooCase:
    """A case over `sentences`."""
    return ZooCase(
        name,
        lively(model),
        "classification",
        sentences(labels),
        treatment,
        pair=inputs_and_labels,
        **options,
    )
