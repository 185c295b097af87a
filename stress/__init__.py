"""Long, random trials of what must never happen: ``python -m stress list``."""
