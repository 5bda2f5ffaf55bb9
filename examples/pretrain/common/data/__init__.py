"""From files to batches of two views."""
