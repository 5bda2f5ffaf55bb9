"""Time and memory of the parts."""
