"""What leans on the internals of CPython and torch to be fast, each with the slow way beside it where there is one."""
