"""The first run: trains a small backbone in minutes and reports what it learned."""
