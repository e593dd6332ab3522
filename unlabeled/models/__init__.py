"""From a configuration or a checkpoint to a model that is ready for training."""
