"""What a zoo is for: applications on the rows of any zoo, each beside the baselines that keep it honest."""
