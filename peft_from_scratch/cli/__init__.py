"""TODO: essay."""
