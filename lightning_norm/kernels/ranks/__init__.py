"""Statistics on their way to other ranks and back."""
