"""Who fills a seat: scripted, replayed, or a language model."""
