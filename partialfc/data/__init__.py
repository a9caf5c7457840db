"""From images to batches: shards, index, sampling plan, loaders, and synthetic identities."""

from partialfc.data.augment import horizontal_flips
from partialfc.data.batch import MASKED_LABEL, Batch, normalize_images
from partialfc.data.decode import decode_image
from partialfc.data.index import ShardIndex
from partialfc.data.loader import SequentialLoader, TorchLoader
from partialfc.data.packing import PackReport, SkippedFile, pack
from partialfc.data.plan import SamplePlan, rank_slice
from partialfc.data.report import DatasetReport, SplitReport, inspect
from partialfc.data.synthesis import synthesize
from partialfc.data.synthetic import SyntheticFaces

__all__ = [
    "MASKED_LABEL",
    "Batch",
    "DatasetReport",
    "PackReport",
    "SamplePlan",
    "SequentialLoader",
    "ShardIndex",
    "SkippedFile",
    "SplitReport",
    "SyntheticFaces",
    "TorchLoader",
    "decode_image",
    "horizontal_flips",
    "inspect",
    "normalize_images",
    "pack",
    "rank_slice",
    "synthesize",
]
