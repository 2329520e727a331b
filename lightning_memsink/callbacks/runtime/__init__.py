"""What callbacks share where they touch a Trainer: strategies, checkpoints, interrupts, passes of their own."""
