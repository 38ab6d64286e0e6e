"""What the kernel maps hold: layout, wanted entries, plan, rendering. Pure."""
