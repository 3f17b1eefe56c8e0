r"""KD token: DeiT's distillation token in the stream (Touvron et al. 2021, arXiv 2012.12877, Sec. 4).

    L = (1 - \alpha) CE(z_{cls}, y) + \alpha K_\tau(z_t || z_{kd})

A learnable token joins the embedded sequence and is read out after the final norm by its own head, z_kd (B, C_t);
inference blends both heads. It is D-CDL without KD prompts: prompts/kd_prompt.py with length 0. Of DeiT's two losses
this is the soft one (Eq. 2), as in the CDL authors' code (arXiv 2407.13911); DeiT itself prefers the hard one, CE
against the teacher's predicted class.
"""

from __future__ import annotations

from typing import ClassVar

from hf_cdl.distill.kd_head import KDHead


class KDToken(KDHead):
    student_parts: ClassVar = {"kd_prompt": {"length": 0}}
