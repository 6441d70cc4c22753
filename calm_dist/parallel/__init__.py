"""Code that deals with processes: launch, groups, pipeline schedule, ZeRO engine."""
