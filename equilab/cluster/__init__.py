"""A study's graph, run on this machine or on a cluster, each job as a command of its own."""
