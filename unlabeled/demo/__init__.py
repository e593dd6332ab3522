"""Small real corpora, task data sets and pretrained models from pip packages, for demonstrations and tests."""
