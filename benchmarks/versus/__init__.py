"""memplan side by side with the peers: see ``__main__.py``."""
