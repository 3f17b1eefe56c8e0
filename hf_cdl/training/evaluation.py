"""What a model answers, taken apart: the right class among its task's own, the right task, and how sure it is of it.

An image counts as *right within its task* if the largest logit of its task's classes is that of its class, and its
task as *identified* if the largest of all logits belongs to one of its task's classes. An answer is right exactly if
both hold, so a task's accuracy is at most the smaller of the two.

Confidence is the largest softmax probability over all classes seen. For heads whose logits are no log-probabilities
(class means, ridge) it is what a user of the softmax would be told, not what the head was made for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

BINS = 15


def judge(logits: torch.Tensor, labels: torch.Tensor, classes: slice) -> dict[str, torch.Tensor]:
    """`correct`, `within_task`, `task_identification`: (B,) bool; `confidence`: (B,) in 0..1; `label` as given.

    `logits`: (B, C) over all classes seen; `labels`: (B,) of one task, whose classes are `classes`.
    """
    predicted = logits.argmax(dim=-1)
    return {
        "correct": predicted == labels,
        "within_task": logits[:, classes].argmax(dim=-1) == labels - classes.start,
        "task_identification": (classes.start <= predicted) & (predicted < classes.stop),
        "confidence": logits.float().softmax(dim=-1).amax(dim=-1),
        "label": labels,
    }


def class_accuracy(correct: torch.Tensor, label: torch.Tensor, names: Sequence[str], first: int) -> dict[str, float]:
    """Accuracy in percent on the images (N,) of each class that has some; `first` is the label of `names[0]`."""
    own = {name: correct[label == first + number] for number, name in enumerate(names)}
    return {name: 100 * hits.double().mean().item() for name, hits in own.items() if len(hits)}


def calibration_error(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """Expected calibration error in percent points: |accuracy - mean confidence| over 15 bins of equal width.

    Both (N,), N > 0; a bin (i/15, (i+1)/15] counts by its share of the images. Naeini et al. 2015, as used by Guo et
    al. 2017 (arXiv:1706.04599, eq. 3).
    """
    confidence = confidence.cpu().double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gap = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, correct.cpu().double() - confidence)
    return 100 * gap.abs().sum().item() / len(confidence)
