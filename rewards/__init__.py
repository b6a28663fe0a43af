"""What is rewarded and measured: a file per task, plain Python."""
