"""Re-exports the architectures at the path used by pyiqa's registry and by pickles."""

from __future__ import annotations

from .metrics.deep_prompt_iqa import DeepPromptIQA
from .metrics.fitted import FittedIQA
from .metrics.prompt_iqa import OpenCLIPIQA, OpenQualiCLIP, PromptIQA

__all__ = ["DeepPromptIQA", "FittedIQA", "OpenCLIPIQA", "OpenQualiCLIP", "PromptIQA"]
