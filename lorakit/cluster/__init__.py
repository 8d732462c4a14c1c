"""Ray: a cluster to join, or one of this machine; work spread over its nodes as tasks, and what the nodes can see."""
