"""Which cells of two maps belong together: by their places, by their features, by any cost."""

from densessl.matching.distance import DistanceMatcher
from densessl.matching.nearest import NearestMatcher
from densessl.matching.pairs import Pairs, gather_tokens, pairs_to_mask
from densessl.matching.similarity import feature_distance

__all__ = ["DistanceMatcher", "NearestMatcher", "Pairs", "feature_distance", "gather_tokens", "pairs_to_mask"]
