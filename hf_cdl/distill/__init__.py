"""Distillation terms. A new one is one file here and one line in TERMS."""

from __future__ import annotations

from hf_cdl.distill.kd import KD
from hf_cdl.distill.kdp import KDP
from hf_cdl.distill.objective import Objective, Term

TERMS: dict[str, type[Term]] = {
    "kd": KD,
    "kdp": KDP,
}

__all__ = ["TERMS", "Objective", "Term"]
