"""From images to batches: shards, index, sampling plans, loaders, importers, and synthetic identities."""

from partialfc.data.augment import Augmentation, horizontal_flips
from partialfc.data.batch import MASKED_LABEL, BadSample, Batch, normalize_images
from partialfc.data.combine import DedupReport, dedup, merge, split
from partialfc.data.dali_loader import DaliLoader
from partialfc.data.dali_stream import DaliStream
from partialfc.data.decode import decode_image
from partialfc.data.errors import DataError, SampleError
from partialfc.data.export import ExportReport, export_folder, export_records
from partialfc.data.identity_plan import IdentityPlan
from partialfc.data.index import ShardIndex
from partialfc.data.indexing import IndexReport, index_tars
from partialfc.data.joined import JoinedIndex
from partialfc.data.loader import Loader, SequentialLoader, TorchLoader
from partialfc.data.mixed_plan import MixedPlan
from partialfc.data.packing import PackReport, SkippedFile, pack
from partialfc.data.plan import Draws, Plan, RankSteps, SamplePlan, rank_slice
from partialfc.data.remote import CacheSettings
from partialfc.data.report import DatasetReport, SplitReport, stats
from partialfc.data.sample_grid import sample_grid
from partialfc.data.sources import open_source
from partialfc.data.streaming import StreamingLoader
from partialfc.data.synthesis import synthesize
from partialfc.data.synthetic import SyntheticFaces
from partialfc.data.verifying import VerifyReport, verify
from partialfc.data.webdataset_loader import WebDatasetLoader
from partialfc.data.webdataset_stages import load_stages
from partialfc.data.weighted_plan import RepeatPlan, WeightedPlan

__all__ = [
    "MASKED_LABEL",
    "Augmentation",
    "BadSample",
    "Batch",
    "CacheSettings",
    "DaliLoader",
    "DaliStream",
    "DataError",
    "DatasetReport",
    "DedupReport",
    "Draws",
    "ExportReport",
    "IdentityPlan",
    "IndexReport",
    "JoinedIndex",
    "Loader",
    "MixedPlan",
    "PackReport",
    "Plan",
    "RankSteps",
    "RepeatPlan",
    "SampleError",
    "SamplePlan",
    "SequentialLoader",
    "ShardIndex",
    "SkippedFile",
    "SplitReport",
    "StreamingLoader",
    "SyntheticFaces",
    "TorchLoader",
    "VerifyReport",
    "WebDatasetLoader",
    "WeightedPlan",
    "decode_image",
    "dedup",
    "export_folder",
    "export_records",
    "horizontal_flips",
    "index_tars",
    "load_stages",
    "merge",
    "normalize_images",
    "open_source",
    "pack",
    "rank_slice",
    "sample_grid",
    "split",
    "stats",
    "synthesize",
    "verify",
]
