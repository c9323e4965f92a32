"""The trainers people already use."""
