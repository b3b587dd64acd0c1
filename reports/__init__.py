"""Turn records into tables."""
