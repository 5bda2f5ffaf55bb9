"""Parts of torture.py: the runs, the settings that they have, and what is done to them."""
