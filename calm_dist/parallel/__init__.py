"""Everything that knows about processes: launch, groups, pipeline schedule, ZeRO engine."""
