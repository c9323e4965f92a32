"""Plan + RunRecord -> report."""
