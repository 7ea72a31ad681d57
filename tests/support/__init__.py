"""What tests share: settings, the pool of worker processes, the jobs they run, and faults to put in."""
