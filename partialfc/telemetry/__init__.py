"""Metrics, progress and profiler ranges."""

from partialfc.telemetry.metrics import METRICS_FILE, MetricsLog, read_metrics
from partialfc.telemetry.profiler import profiled
from partialfc.telemetry.progress import ProgressBar
from partialfc.telemetry.throughput import Throughput

__all__ = ["METRICS_FILE", "MetricsLog", "ProgressBar", "Throughput", "profiled", "read_metrics"]
