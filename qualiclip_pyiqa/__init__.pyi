# The public names, read by type checkers and, at run time, by lazy_loader.
from .archs import ContriqueIQA as ContriqueIQA
from .archs import FittedIQA as FittedIQA
from .archs import OpenCLIPIQA as OpenCLIPIQA
from .archs import OpenQualiCLIP as OpenQualiCLIP
from .archs import ReIQA as ReIQA
from .errors import ImageError as ImageError
from .errors import PromptError as PromptError
from .errors import SettingsError as SettingsError
from .errors import WeightsError as WeightsError
from .explain.quality_map import QualityMap as QualityMap
from .explain.quality_map import quality_map as quality_map
from .export.write import export_metric as export_metric
from .images.tensors import as_batch as as_batch
from .images.tensors import from_bgr as from_bgr
from .images.tensors import from_nhwc as from_nhwc
from .images.tensors import load_image as load_image
from .loop.loss import QualityLoss as QualityLoss
from .metrics.base import BlindMetric as BlindMetric
from .metrics.exported import ExportedIQA as ExportedIQA
from .metrics.prompts import prompt_set_names as prompt_set_names
from .metrics.registry import METRICS as METRICS
from .report.profile import Profile as Profile
from .report.profile import Profiler as Profiler
from .report.profile import profile as profile
from .scoring.allocator import keep_freed_memory as keep_freed_memory
from .scoring.scorer import Scorer as Scorer
from .scoring.tables import Record as Record

__version__: str
