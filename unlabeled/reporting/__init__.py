"""The run plan, the lineage, the model card, plots and samples."""
