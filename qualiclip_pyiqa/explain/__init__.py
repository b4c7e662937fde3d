"""Quality maps: which places of an image decide its scores."""
