"""What runs inside one process: engine loop, scheduler, expert host, links, KV transfer. Plain classes."""
