"""The model in the box, the script that trained it, and the demo that streams from it."""
