"""The label that marks a position without a target."""

IGNORE_INDEX = -100  # the default `ignore_index` of `torch.nn.functional.cross_entropy`, and what transformers uses
