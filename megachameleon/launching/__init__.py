"""From a cluster's nodes to running ranks: a launcher for each node, a keeper for each job, a check of the nodes.

Everything here but the pre-flight check's own measurements needs the standard library only, so that a batch script can
run it beside a container that holds the rest.
"""
