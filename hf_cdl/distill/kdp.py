r"""KDP / D-CDL: the teacher's logits train a KD head through a KD token and KD prompts (arXiv 2407.13911, v3+).

    L = (1 - \alpha) CE(z_{cls}, y) + \alpha K_\tau(z_t || z_{kd})

Cross-entropy trains the CLS head, the distillation loss the KD head; both train the prompts, since CLS attends to the
KD token. The token and prompts themselves are in prompts/kd_prompt.py; inference blends both heads.
"""

from __future__ import annotations

from typing import ClassVar

from hf_cdl.distill.kd_head import KDHead


class KDP(KDHead):
    student_parts: ClassVar = {"kd_prompt": {}}
