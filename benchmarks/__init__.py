"""The same work done by this project and by its peers, as ratios measured in one run."""
