"""Every way in which a cached result could be wrong, tried with torchcache and its rivals."""
