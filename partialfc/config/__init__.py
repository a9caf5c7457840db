"""The configuration of a run.

A configuration is YAML. `extends: other.yaml` starts from another file; later values win. A margin, a center optimizer,
a schedule and a sampling are replaced, not merged, when their name changes: the settings of one mean nothing to
another. On the command line, `head.sample_rate=0.1` overrides one value.
"""

from partialfc.config.loading import dump_config, flat_settings, json_schema, load_config, write_config
from partialfc.config.sections import CENTER_OPTIMIZERS, Config, DataConfig, EngineConfig, HeadConfig, TaskConfig

__all__ = [
    "CENTER_OPTIMIZERS",
    "Config",
    "DataConfig",
    "EngineConfig",
    "HeadConfig",
    "TaskConfig",
    "dump_config",
    "flat_settings",
    "json_schema",
    "load_config",
    "write_config",
]
