"""What notebooks and claims compute and draw from results."""
