"""Several language models reason together in turns, and are trained together to be right and brief."""

__version__ = "0.1.0"
