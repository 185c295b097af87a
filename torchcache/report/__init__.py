"""What is counted and said."""
