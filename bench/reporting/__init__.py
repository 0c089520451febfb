"""What becomes of the measurements: results files, ratios, tables and pictures."""
