"""What people ask before they train: how much memory for what speed, and what is the most that fits."""
