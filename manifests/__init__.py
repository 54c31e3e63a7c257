"""Ways to run Braid on other systems: Kubernetes manifests, container file, Ray job entry."""
