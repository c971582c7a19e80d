"""A report on runs: one HTML page to look at, a CSV file and Markdown tables."""
