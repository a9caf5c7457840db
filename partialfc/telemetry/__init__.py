"""Metrics, progress and profiler ranges."""

from partialfc.telemetry.metrics import METRICS_FILE, MetricsLog, read_metrics
from partialfc.telemetry.profiler import profiled
from partialfc.telemetry.progress import ProgressBar

__all__ = ["METRICS_FILE", "MetricsLog", "ProgressBar", "profiled", "read_metrics"]
