"""The stages that train, and the loop they share."""
