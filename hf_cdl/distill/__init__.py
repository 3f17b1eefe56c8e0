"""Distillation terms. A new one takes one file and one name in TERMS: here, or with `TERMS.register` in a plugin."""

from __future__ import annotations

from hf_cdl.distill.dist import DIST
from hf_cdl.distill.dkd import DKD
from hf_cdl.distill.dual_path import DualPath
from hf_cdl.distill.fitnets import FitNets
from hf_cdl.distill.kd import KD
from hf_cdl.distill.kd_token import KDToken
from hf_cdl.distill.kdp import KDP
from hf_cdl.distill.kdp_labels import KDPLabels
from hf_cdl.distill.label_smoothing import LabelSmoothing
from hf_cdl.distill.objective import LOSSES, Objective, Term
from hf_cdl.distill.os_prompt import OSPrompt
from hf_cdl.distill.prompt_mapping import PromptMappingKD
from hf_cdl.distill.pseudo_labels import PseudoLabels
from hf_cdl.distill.review_kd import ReviewKD
from hf_cdl.distill.similarity import Similarity
from hf_cdl.registry import Registry

TERMS: Registry[Term] = Registry(
    "TERMS",
    "distillation term",
    Term,
    {
        "kd": KD,
        "dkd": DKD,
        "dist": DIST,
        "kd_token": KDToken,
        "kdp": KDP,
        "kdp_labels": KDPLabels,
        "fitnets": FitNets,
        "review_kd": ReviewKD,
        "similarity": Similarity,
        "dual_path": DualPath,
        "label_smoothing": LabelSmoothing,
        "prompt_mapping": PromptMappingKD,
        "os_prompt": OSPrompt,
        "pseudo_labels": PseudoLabels,
    },
    reserved=LOSSES,
)

__all__ = ["TERMS", "Objective", "Term"]
