"""What the recipes share: a flat package of small modules, each with one purpose."""

__version__ = "0.1.0"
