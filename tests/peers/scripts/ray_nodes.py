"""Starts a Ray cluster of two machines in this one; prints its address, and a line for every command read from standard input.

"kill" kills the second machine, "add" adds another, and the end of the input ends the cluster.
"""

import sys

from ray.cluster_utils import Cluster

MACHINE = {"num_cpus": 1, "object_store_memory": 80 << 20}

cluster = Cluster(initialize_head=True, head_node_args={**MACHINE, "include_dashboard": False})
second = cluster.add_node(**MACHINE)
print(f"address {cluster.address}", flush=True)
for line in sys.stdin:
    if line.strip() == "kill":
        cluster.remove_node(second, allow_graceful=False)
    elif line.strip() == "add":
        second = cluster.add_node(**MACHINE)
    print(line.strip(), flush=True)
cluster.shutdown()
