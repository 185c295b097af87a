"""Where rows are kept: in memory, in the write queue, on disk."""
