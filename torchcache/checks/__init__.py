"""What must hold before a computed row is kept."""
