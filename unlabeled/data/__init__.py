"""From a path to rows: which files a source names, what their formats hold, and what identifies their content."""
