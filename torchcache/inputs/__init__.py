"""A call as samples."""
