"""The architectures under the path that pyiqa's registry and pickles know them by."""

from __future__ import annotations

from .metrics.prompt_iqa import OpenCLIPIQA, OpenQualiCLIP, PromptIQA

__all__ = ["OpenCLIPIQA", "OpenQualiCLIP", "PromptIQA"]
