"""All that crosses from one pipeline stage to the next: how it is packed, how wide it is, how it is sent."""
