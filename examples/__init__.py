"""Programs and recipes that assemble the parts of densessl."""
