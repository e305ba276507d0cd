"""What a server could carry: `millrace plan`."""
