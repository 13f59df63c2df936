"""Sources of offline data: environments and the trajectories that are gathered in them, a file each."""
