r"""Prompt mapping: a student with mapped teacher prompts learns the teacher's logits (CDL-Prompt, arXiv 2407.13911v1).

    L = (1 - \alpha) CE(z_{cls}, y) + \alpha K_\tau(z_t || z_{kd})

z_{kd} (B, C_t) is a second head on the CLS token, so both losses train the mapper and the student's own prompts
through it. The mapper is in prompts/mapping.py. In the authors' code teacher and student steps alternate batch by
batch; here, as for every term, the teacher finishes learning the task before it teaches.
"""

from __future__ import annotations

from typing import ClassVar

from hf_cdl.distill.kd_head import KDHead
from hf_cdl.distill.objective import Asks


class PromptMappingKD(KDHead):
    student_parts: ClassVar = {"mapping": {}}

    @classmethod
    def check_recipe(cls, student: Asks, teacher: Asks | None) -> list[tuple[str, str]]:
        if teacher is not None and not teacher.prompted:
            return [("teacher.prompt.type", "is none, but a mapping needs a teacher with prompts")]
        if teacher is not None and teacher.query not in (None, "student"):
            what = "but a mapping asks the teacher's prompts with the student's query; set it to student"
            return [("teacher.query", f"is {teacher.query!r}, {what}")]
        return []
