"""Key to bytes, for every process of the machine. Nothing in this package imports torch."""
