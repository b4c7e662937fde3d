"""Re-exports the architectures at the path used by pyiqa's registry and by pickles."""

from __future__ import annotations

from .metrics.contrastive import ContriqueIQA, ReIQA
from .metrics.deep_prompt_iqa import DeepPromptIQA
from .metrics.face_norm import FaceNorm
from .metrics.fitted import FittedIQA
from .metrics.prompt_iqa import OpenCLIPIQA, OpenQualiCLIP, PromptIQA
from .metrics.ranking import RankingAwareIQA

__all__ = [
    "ContriqueIQA",
    "DeepPromptIQA",
    "FaceNorm",
    "FittedIQA",
    "OpenCLIPIQA",
    "OpenQualiCLIP",
    "PromptIQA",
    "RankingAwareIQA",
    "ReIQA",
]
