"""Decides and reconciles: spec, cluster state, controller, launch, front ends, command line, telemetry."""
