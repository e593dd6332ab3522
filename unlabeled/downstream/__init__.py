"""What the recipes that end in a task share: labelled data, their trainer with its metrics, and sentence embeddings."""
