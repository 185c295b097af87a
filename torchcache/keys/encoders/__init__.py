"""How objects of one kind are encoded, a function for each: ``(encoding, value, path)`` to bytes."""
