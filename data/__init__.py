"""What is trained on: a file per task, and what prepares its samples. Plain Python; torch only where a .pth is read."""
