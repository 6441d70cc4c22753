"""Seconds of collectives between ranks in one node or in several.

A group of n ranks has m ranks in each of its nodes. Ranks use NVLink inside a node, and m network
cards at once between nodes; the slower of the two decides. An all-reduce moves 2 (n-1)/n of its
bytes through each rank, a reduce-scatter or an all-gather half of that. Latency grows with the
depth of a tree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from calm_dist.costs.clusters import Cluster
from calm_dist.recipe import LanguageModelRecipe


@dataclass(frozen=True)
class Group:
    """Ranks of a collective: their number, and how many of them share a node."""

    ranks: int
    per_node: int

    def bandwidth(self, cluster: Cluster) -> float:
        """Bytes/s through each rank."""
        if self.ranks <= self.per_node:
            return cluster.node_bandwidth * cluster.rates.link_fraction
        between = self.per_node * cluster.network_bandwidth
        inside = cluster.node_bandwidth if self.per_node > 1 else math.inf
        return min(between, inside) * cluster.rates.link_fraction

    def latency(self, cluster: Cluster) -> float:
        inside = math.ceil(math.log2(min(self.ranks, self.per_node)))
        nodes = -(-self.ranks // self.per_node)
        return inside * cluster.node_latency + math.ceil(math.log2(nodes)) * cluster.network_latency

    def half(self, size: float, cluster: Cluster) -> float:
        """Seconds of a reduce-scatter or an all-gather whose whole tensor has ``size`` bytes."""
        if self.ranks == 1:
            return 0.0
        moved = size * (self.ranks - 1) / self.ranks
        return moved / self.bandwidth(cluster) + self.latency(cluster)

    def all_reduce(self, size: float, cluster: Cluster) -> float:
        """Seconds of an all-reduce of ``size`` bytes."""
        return 2 * self.half(size, cluster)


@dataclass(frozen=True)
class Groups:
    """The groups of a recipe's ranks, whose order is tensor, context, pipeline, data."""

    tensor: Group
    data: Group
    """Replicas of the backbone's parameters: data x context."""
    head: Group
    """All ranks of the last stage."""


def groups(recipe: LanguageModelRecipe, cluster: Cluster) -> Groups:
    """Place a recipe's groups in a cluster's nodes."""
    parallel, node = recipe.parallel, cluster.gpus_per_node
    tensor, context = parallel.tensor_parallel_size, parallel.context_parallel_size
    shards, replica = tensor * context, parallel.model_parallel_size
    copies = recipe.data_parallel_size
    replicas_in_node = min(copies, max(1, node // replica))
    # If a group's size does not divide the node, some groups span two nodes, and all wait for them.
    shards_in_node = math.gcd(shards, node)
    return Groups(
        Group(tensor, math.gcd(tensor, node)),
        Group(copies * context, replicas_in_node * max(1, shards_in_node // tensor)),
        Group(copies * shards, replicas_in_node * shards_in_node),
    )


def send(recipe: LanguageModelRecipe, cluster: Cluster, stage: int, size: float) -> float:
    """Seconds to send ``size`` bytes from each rank of a stage to the next stage."""
    parallel = recipe.parallel
    shards = parallel.tensor_parallel_size * parallel.context_parallel_size
    node = cluster.gpus_per_node
    following = (stage + 1) % parallel.pipeline_parallel_size
    if stage * shards // node == following * shards // node:
        return size / (cluster.node_bandwidth * cluster.rates.link_fraction) + cluster.node_latency
    bandwidth = cluster.network_bandwidth * cluster.rates.link_fraction
    return size / bandwidth + cluster.network_latency
