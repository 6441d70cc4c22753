"""Parameters and FLOPs of a recipe, under the name that scripts rely on; see `costs.flops`."""

from calm_dist.costs.flops import Counts, Part, count

__all__ = ["Counts", "Part", "count"]
