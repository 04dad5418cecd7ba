"""The commands of `turnwise`, by what they are for."""
