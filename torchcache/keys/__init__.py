"""What makes two calls the same."""
