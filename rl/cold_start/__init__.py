"""The cold start of Long⊗Short: which thoughts of a long chain are worth keeping long."""
