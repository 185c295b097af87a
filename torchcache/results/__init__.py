"""What was returned, as rows, and back."""
