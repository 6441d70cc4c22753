"""What a user looks at: plans before a run, comparisons and reports after it."""
