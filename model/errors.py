"""What can be wrong with a model directory.

ModelError
├── ConfigError       a value in config.json, named by its field
└── CheckpointError   a shard, the index or a tensor, named
"""


class ModelError(Exception):
    """A model directory that cannot be served."""


class ConfigError(ModelError):
    """A field of config.json is missing, has the wrong type, or names something this program does not compute."""


class CheckpointError(ModelError):
    """The index, a shard or a tensor is missing, surplus, truncated or of the wrong shape or dtype."""
