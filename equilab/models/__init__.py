"""The networks, and the families that they are of."""
