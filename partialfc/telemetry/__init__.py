"""Metrics, progress and profiler ranges."""

from partialfc.telemetry.lines import drop_from_step, read_lines
from partialfc.telemetry.metrics import METRICS_FILE, TENSORBOARD_DIRECTORY, MetricsLog, read_metrics
from partialfc.telemetry.profiler import profiled
from partialfc.telemetry.progress import ProgressBar
from partialfc.telemetry.throughput import Throughput

__all__ = [
    "METRICS_FILE",
    "TENSORBOARD_DIRECTORY",
    "MetricsLog",
    "ProgressBar",
    "Throughput",
    "drop_from_step",
    "profiled",
    "read_lines",
    "read_metrics",
]
