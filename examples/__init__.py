"""Real training loops, each in its trainer's own form; all that is added is marked `# regjax`."""
