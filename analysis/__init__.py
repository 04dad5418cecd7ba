"""What episodes add up to: summaries, tables, and what brevity cost."""
